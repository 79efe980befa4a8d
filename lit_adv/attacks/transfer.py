"""Transfer: an attack on local models, whose images are tried once on the model under attack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lit_adv.answers import cast, check_answer, dtype_of, evaluating
from lit_adv.attack import Attack, IterativeAttack, Search, State
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.losses import Loss
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel


class Transfer(IterativeAttack):
    """Runs an attack on one or several local models, and tries what it finds on the model under attack.

    The local attack gets true labels (or targets), is free of charge and runs all its steps, for an image that only
    just fools the local models seldom fools another: of each image it returns the last one that fooled them, or else
    its last one. The model under attack sees that image alone, once, as a check: ``queries - checks`` is 0. Several
    models are attacked by the weighted sum of their losses (with ``kappa``, each cut there); they count as fooled
    where their mean probability is largest for a wrong class (or the target).

    Departures from the released code: its kappa of 100 is the local attack's to choose; an image that fooled the local
    models goes before a later one that does not.

    Args:
        attack: what is run on the local models, e.g. :class:`~lit_adv.attacks.PGD`; its threat model and its seed are
            this attack's. Several models need one with a ``loss``.
        models: local models, images in the same box to logits of the same classes; they need not be of the target's
            kind. They are moved to the images' device.
        weights: of the models' losses, >= 0; None: 1 each.
        surrogate: a method or a part of the one local model that gradients go through instead of its own surrogate,
            e.g. ``"softsign"``; what the model itself decides still says whether it is fooled.

    Raises:
        ValueError: no model, weights of another number or negative, several models and an attack without a loss or
            with a surrogate, a surrogate that the model does not have; when called: models of different classes, labels
            beyond them, a model that does not take the images.
    References:
        Bhagoji et al. 2018, https://arxiv.org/abs/1712.09491, table 5 (FGS and IFGS on one to three
        local models: 40 steps of 0.01 in a ball of 0.3); Liu et al. 2017, https://arxiv.org/abs/1611.02770 (ensembles).
    """

    steps = 1
    access = Access.LABEL
    needs_whole_step = False
    looks_first = True

    def __init__(
        self,
        attack: Attack,
        models: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        surrogate: str | None = None,
    ) -> None:
        if not isinstance(attack, Attack):
            raise ValueError(f"attack must be an attack on the local models, e.g. PGD(), got {attack!r}")
        if isinstance(models, nn.Module) or not all(isinstance(model, nn.Module) for model in models):
            raise ValueError(f"models must be a list of modules from images to logits, got {type(models).__name__}")
        if not len(models):
            raise ValueError("models must hold at least one local model, got none")
        shares = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
        if len(shares) != len(models) or not all(0 <= share < float("inf") for share in shares) or not sum(shares):
            raise ValueError(
                f"weights must be one number >= 0 per model ({len(models)}), not all 0, or None, got {weights}"
            )
        if len(models) > 1 and not callable(getattr(attack, "loss", None)):
            raise ValueError(
                f"attack {type(attack).__name__} has no loss of which {len(models)} models could make a sum: give one "
                "model, or an attack with a loss, e.g. PGD"
            )
        if surrogate is not None and len(models) > 1:
            raise ValueError(
                f"surrogate {surrogate!r} is of one local model, got {len(models)}: transfer from each alone"
            )
        if surrogate is not None:
            QueryOracle(models[0], 0, surrogate=surrogate)  # refuses one that the model does not have
        self.attack, self.models, self.weights = copy.copy(attack), list(models), weights
        self.surrogate = surrogate
        if hasattr(attack, "stop_at_hit"):
            self.attack.stop_at_hit = False  # type: ignore[attr-defined]
        self.threat, self.seed = attack.threat, attack.seed
        self._shares = shares

    def with_threat(self, threat: ThreatModel) -> Transfer:
        other = super().with_threat(threat)
        other.attack = self.attack.with_threat(threat)
        return other

    @property
    def needs_fit(self) -> bool:
        return self.attack.needs_fit

    @property
    def fitted_on(self) -> str:
        return self.attack.fitted_on

    def fit(self, images: Tensor, labels: Tensor, path: str | None = None) -> None:
        self.attack.fit(images, labels, path)

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return 1

    def start(self, search: Search, rows: Tensor) -> State:
        return State(**search.fresh(rows))

    def step(self, search: Search, state: State) -> State:
        """Ask nothing: the loop's last look at the row is the one query."""
        for model in self.models:
            model.to(state.x0.device)
        attack, local = copy.copy(self.attack), self.models[0]
        attack.seed = search.seed
        with evaluating(*self.models):
            width = self._width(state)
            if len(self.models) > 1:
                local = Joined(self.models, self._shares).eval()
                attack.loss = Summed(attack.loss, self._shares, width, getattr(attack, "kappa", None))  # type: ignore[attr-defined]
                attack.kappa = None  # type: ignore[attr-defined]
            oracle = QueryOracle(local, len(state), confirm=1, known_right=True, surrogate=self.surrogate)
            x0 = state.x0.to(oracle.dtype) if oracle.dtype in (torch.float32, torch.float64) else state.x0
            found = attack(oracle, x0, state.y, state.target, search.index[state.rows])
        search.count("images fooled the local models", found.success)
        state.x = self.threat.project(found.x_adv.to(state.x0.dtype), state.x0)
        return state

    def _width(self, state: State) -> int:
        """Columns of each local model's answer; they must take the images and know the same classes, all labels."""
        known = [_answers(model, place, state.x0[:1]) for place, model in enumerate(self.models)]
        if len(set(known)) > 1:
            counts = ", ".join(str(width - refuses) for width, refuses in known)
            raise ValueError(f"models must know the same classes, got {counts} of them: leave out the others' kind")
        width, refuses = known[0]
        for name, value in (("y", state.y), ("target", state.target)):
            if value is not None and int(value.max()) >= width - refuses:
                raise ValueError(
                    f"{name} holds class {int(value.max())}, but the local models know classes 0 to "
                    f"{width - refuses - 1}: choose models of the same data"
                )
        return width


class Joined(Defense):
    """Several classifiers as one: what they decide together, and what each of them says.

    Answers hold the mean probabilities, whose largest is the decision, then the log-probabilities of each model, which
    are all smaller: (n, (m + 1) W) for m models of W columns. :class:`Summed` takes them apart.

    Args:
        models: images to logits of one width. shares: weights of the models, not all 0.
    """

    def __init__(self, models: Sequence[nn.Module], shares: Sequence[float]) -> None:
        super().__init__()
        self.models, self._shares = nn.ModuleList(models), [share / sum(shares) for share in shares]
        self.stochastic = any(getattr(model, "stochastic", False) for model in models)
        self.reject = getattr(models[0], "reject", None)

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        return self._join(x, [_ask(model, model, x, draws) for model in self.models])

    def surrogate(self, x: Tensor, draws: Draws | None = None) -> Tensor:  # type: ignore[override]
        return self._join(x, [_ask(getattr(model, "surrogate", model), model, x, draws) for model in self.models])

    def _join(self, x: Tensor, answers: list[Tensor]) -> Tensor:
        told = [answer.to(x.dtype).log_softmax(-1) for answer in answers]
        decided = torch.stack([share * logs.detach().exp() for share, logs in zip(self._shares, told, strict=True)])
        return torch.cat([decided.sum(0), *told], -1)


class Summed:
    """The weighted sum of a loss over the models of a :class:`Joined`.

    Args:
        loss: of each model. shares: its weights. width: columns of each model's answer.
        ceiling: where each model's loss is cut: beyond it there is nothing to gain from that model; None: nowhere.
    """

    def __init__(self, loss: Loss, shares: Sequence[float], width: int, ceiling: float | None = None) -> None:
        self.loss, self.shares, self.width, self.ceiling = loss, shares, width, ceiling

    def __call__(self, scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
        total = scores.new_zeros(())
        for part, share in zip(torch.split(scores, self.width, -1)[1:], self.shares, strict=True):
            value = self.loss(part, y, target, reject)
            total = total + share * (value if self.ceiling is None else value.clamp_max(self.ceiling))
        return total


def _ask(ask: Callable[..., Tensor], model: nn.Module, x: Tensor, draws: Draws | None) -> Tensor:
    dtype = dtype_of(model)
    x = x if dtype is None else x.to(dtype)  # differentiable, where the models differ
    return ask(x, draws=draws) if getattr(model, "stochastic", False) else ask(x)


def _answers(model: nn.Module, place: int, x: Tensor) -> tuple[int, bool]:
    """Columns of a local model's answer to an image, and whether one of them is a refusal."""
    zero = torch.zeros(1, dtype=torch.int64, device=x.device)
    try:
        with torch.no_grad():
            answer = _ask(model, model, cast(x, model), Draws(0, zero, zero, -6))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"models[{place}], a {type(model).__name__}, does not take images of shape {tuple(x.shape[1:])} ({error}): "
            "choose one trained on the same data"
        ) from error
    check_answer(answer, 1, "logits", model)
    return answer.shape[1], getattr(model, "reject", None) is not None
