"""Projected gradient ascent, with any gradient estimator: FGSM, BIM, MI-FGSM and PGD are settings of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adv.attack import EOT, IterativeAttack, Search, State, check_threat
from lit_adv.estimator import GradientEstimator, ProbeEstimator
from lit_adv.estimators.autograd import Autograd
from lit_adv.gradients import examine
from lit_adv.losses import Loss, cross_entropy, margin
from lit_adv.oracle import Access
from lit_adv.probing import ProbingState, probe, probing_fields
from lit_adv.starts import random_point
from lit_adv.threat import ThreatModel


@dataclass(kw_only=True)
class PGDState(ProbingState):
    """Adds the accumulated gradient, each row's step size and its last losses, oldest first."""

    momentum: Tensor
    rate: Tensor
    losses: Tensor


class PGD(IterativeAttack):
    """Steps of steepest ascent of the loss, each projected into ball and box.

    FGSM: ``steps=1, step_size=eps, random_start=False``. Iterative FGS (BIM): ``random_start=False``. MI-FGSM:
    ``decay=1.0``. Targeted attacks ascend the target's loss. A black-box attack arises from an estimator that reads
    values only: NES (with ``plateau`` the query-limited attack), SPSA, finite differences, bandits. Its probes are
    asked in blocks, each a candidate, and the image itself beside the first, as a check.

    Args:
        threat: norm, radius and box.
        steps: gradient steps per start.
        step_size: length of a step in the norm, pixel units; None: ``2.5 eps / steps``.
        random_start: begin at a uniform random point of the ball instead of at the image.
        restarts: random starts of an unbroken image.
        loss: what is ascended, see :mod:`lit_adv.losses`.
        decay: of the accumulated, l1-normalised gradient; 0 for none.
        estimator: where the gradient comes from.
        kappa: with the margin as loss, an image whose margin exceeds it moves no more; None: it goes on.
        noise: length of a first step along the sign of Gaussian noise (l2: along the noise), pixel units; the ball
            stays where it is. RAND+FGSM with ``steps=1, step_size=eps - noise``.
        plateau: losses looked at: where the newest of so many is no better than the oldest, the step size is halved
            and the looking begins anew. 0: constant.
        min_step_size: that halving does not go below, pixel units.
        stop_at_hit: False runs all steps of every image.
        seed: of the random starts and of an estimator's directions.

    Raises:
        ValueError: an argument out of its range.
    References:
        Madry et al. 2018, https://arxiv.org/abs/1706.06083, section 2.1; Goodfellow et al. 2015,
        https://arxiv.org/abs/1412.6572 (FGSM); Kurakin et al. 2017, https://arxiv.org/abs/1607.02533 (BIM);
        Dong et al. 2018, https://arxiv.org/abs/1710.06081 (MI-FGSM); Tramer et al. 2018,
        https://arxiv.org/abs/1705.07204 (RAND+FGSM); Ilyas et al. 2018, https://arxiv.org/abs/1804.08598 (the
        plateau, 5 losses, is in their code); Carlini & Wagner 2017, https://arxiv.org/abs/1608.04644 (kappa). The
        default step size is that of Madry et al.'s CIFAR-10 challenge, 2.5 eps / steps; their tables give 0.01 of
        0.3 (MNIST) and 2/255 of 8/255.
    """

    def __init__(
        self,
        threat: ThreatModel = ThreatModel(),  # noqa: B008 - frozen
        steps: int = 40,
        step_size: float | None = None,
        random_start: bool = True,
        restarts: int = 1,
        loss: Loss = cross_entropy,
        decay: float = 0.0,
        estimator: GradientEstimator = Autograd(),  # noqa: B008 - frozen
        kappa: float | None = None,
        noise: float = 0.0,
        plateau: int = 0,
        min_step_size: float = 5e-5,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if steps < 1 or restarts < 1 or steps != int(steps):
            raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
        if step_size is not None and not step_size >= 0:
            raise ValueError(f"step_size must be >= 0 in pixel units, or None for 2.5 eps / steps, got {step_size}")
        if not decay >= 0:
            raise ValueError(f"decay must be >= 0, got {decay}")
        if step_size is None and threat.radius == float("inf"):
            raise ValueError("step_size must be given where eps is inf")
        if kappa is not None and (loss is not margin or not kappa >= 0):
            raise ValueError(f"kappa must be >= 0 and needs loss lit_adv.losses.margin, got {kappa} and {loss}")
        if not noise >= 0 or (noise and (random_start or threat.norm not in ("linf", "l2"))):
            raise ValueError(f"noise must be >= 0, in linf or l2 and without random_start, got {noise}")
        if plateau < 0 or plateau == 1 or not min_step_size >= 0:
            raise ValueError(
                f"plateau must be 0 or at least 2 losses and min_step_size >= 0, got {plateau} and {min_step_size}"
            )
        self.kappa, self.noise, self.plateau, self.min_step_size = kappa, noise, plateau, min_step_size
        self.threat, self.steps, self.step_size = threat, steps, step_size
        self.random_start, self.restarts, self.loss, self.decay = random_start, restarts, loss, decay
        self.looks_first = random_start or noise > 0
        self.estimator, self.stop_at_hit, self.seed = estimator, stop_at_hit, seed
        self.access = Access.GRADIENT if estimator.needs_gradient else Access.PROBS

    def adapted(self, stochastic: bool) -> PGD:
        if not isinstance(self.estimator, Autograd):
            return self
        other = copy.copy(self)
        other.eot = self.estimator.eot or (EOT if stochastic else 1)
        other.estimator = Autograd(other.eot)
        return other

    @property
    def needs_fit(self) -> bool:
        return self.estimator.needs_fit

    @property
    def fitted_on(self) -> str:
        return self.estimator.fitted_on

    def fit(self, images: Tensor, labels: Tensor, path: str | None = None) -> None:
        self.estimator.fit(images, labels, path)

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        if isinstance(self.estimator, ProbeEstimator):
            return self.estimator.blocks(shape).size + 1
        return self.estimator.cost(shape)

    def least(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        whole = self.estimator.cost(shape)
        if not isinstance(state, PGDState):
            return whole
        return torch.where(state.phase == 0, whole, 1)

    def start(self, search: Search, rows: Tensor) -> PGDState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        if self.random_start:
            fields["x"] = random_point(self.threat, x0, search.starting_draws(rows))
        elif self.noise:
            noise = search.starting_draws(rows).normal(*x0.shape[1:], dtype=x0.dtype)
            fields["x"] = self.threat.project(x0 + self.noise * self.threat.steepest(noise), x0)
        return PGDState(
            **fields,
            **probing_fields(self.estimator, x0),
            momentum=torch.zeros_like(x0) if self.decay else x0.new_zeros(len(x0), 0),
            rate=torch.full((len(x0),), self._step_size(), dtype=x0.dtype, device=x0.device),
            losses=torch.full((len(x0), self.plateau), torch.nan, dtype=x0.dtype, device=x0.device),
        )

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, PGDState)
        gradient, complete = self._gradient(search, state)
        if self.kappa is not None:
            gradient = torch.where((state.value > self.kappa)[:, None, None, None], 0.0, gradient)
        if self.decay:
            gradient = gradient.nan_to_num(0, 0, 0)  # else one bad pixel would freeze the whole image for good
            size = gradient.abs().mean((1, 2, 3), keepdim=True)
            accumulated = self.decay * state.momentum + gradient / size.clamp_min(1e-30)
            state.momentum = _where(complete, accumulated, state.momentum)
            gradient = accumulated
        direction = self.threat.steepest(gradient)
        if self.plateau:
            self._anneal(state, complete)
            direction.mul_(state.rate[:, None, None, None])
        else:
            direction.mul_(self._step_size())
        state.x = _where(complete, self.threat.project(state.x + direction, state.x0), state.x)
        return state

    def _gradient(self, search: Search, state: PGDState) -> tuple[Tensor, Tensor | None]:
        """The gradient, and for which rows it is complete; None: for all."""
        if isinstance(self.estimator, ProbeEstimator):
            gradient, complete = probe(search, state, self.estimator, self.loss)
            if search.watch:
                zero = ~gradient.flatten(1).any(1)
                search.count("gradient estimates were exactly 0", zero if complete is None else zero[complete])
            return gradient, complete

        def objective(x: Tensor) -> Tensor:
            return self.loss(search.scores(x, state), state.y, state.target, search.reject)

        draws = search.draws(state)
        value, gradient, state.memory = self.estimator(objective, state.x, state.memory, draws, self.threat.box)
        if self.estimator.needs_gradient:
            examine(search, state, gradient)
        state.value = value.to(state.value.dtype)
        return gradient, None

    def _anneal(self, state: PGDState, complete: Tensor | None) -> None:
        """Halve the step size of rows whose loss has stopped rising."""
        losses = torch.cat([state.losses[:, 1:], state.value[:, None]], 1)
        stuck = losses[:, -1] <= losses[:, 0]  # False while the window is not full: NaN
        stuck = stuck if complete is None else stuck & complete
        state.rate = torch.where(stuck, (state.rate / 2).clamp_min(self.min_step_size), state.rate)
        losses = losses.masked_fill(stuck[:, None], torch.nan)
        state.losses = losses if complete is None else torch.where(complete[:, None], losses, state.losses)

    def _step_size(self) -> float:
        return 2.5 * self.threat.radius / self.steps if self.step_size is None else self.step_size


def _where(complete: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if complete is None else torch.where(complete[:, None, None, None], new, old)
