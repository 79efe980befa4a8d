"""Carlini and Wagner's l2 attack: the nearest adversarial image, by gradient descent in tanh space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.gradients import examine
from lit_adv.losses import margin, shortfall
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

_BETAS, _TINY = (0.9, 0.999), 1e-8  # Adam's
_EDGE = 1 - 1e-6  # black and white pixels have a finite arctanh
_NO_UPPER = 1e10


@dataclass(kw_only=True)
class CarliniWagnerState(State):
    """Adds the point in tanh space with Adam's moments, and the search for the constant.

    Attributes:
        u: (n, C, H, W) the point whose tanh is the image. slope: (n, C, H, W) derivative of the image by it.
        centre: (n, C, H, W) the image of the point at which a constant begins, the clean one up to rounding.
        m, v: (n, C, H, W) Adam's moments.
        c, lower, upper: (n,) the constant and what is known of it. round: (n,) constants behind it.
        k: (n,) iterations with this constant. found: (n,) it has made the image adversarial, with confidence.
        previous: (n,) the objective at the last test for progress.
        best: the nearest own adversarial image and near: (n,) its squared distance; kept in training alone, where
            no search is watching, else empty.
    """

    u: Tensor
    slope: Tensor
    centre: Tensor
    m: Tensor
    v: Tensor
    c: Tensor
    lower: Tensor
    upper: Tensor
    round: Tensor
    k: Tensor
    found: Tensor
    previous: Tensor
    best: Tensor
    near: Tensor


class CarliniWagner(IterativeAttack):
    """Minimises ``|x' - x|^2 + c max(kappa - margin, 0)`` over ``x' = (1 + tanh u) / 2`` with Adam, c by bisection.

    The margin is positive where the attacker has won. c starts at ``constant`` and grows tenfold until it succeeds,
    then it is bisected; with 10 constants or more the last is the least that succeeded. Each constant starts at the
    clean image with fresh moments, and is over for a row once its objective falls by less than 0.01 % in a tenth of
    the iterations; a row goes on to its next constant at once and leaves after the last. Of all images asked about the
    nearest adversarial one is kept; with a finite radius and ``stop_at_hit`` a row ends at its first within it. An
    iteration is one query (``eot`` of them), forward and backward.

    A detector's refusal column makes it the attack on the classifier of one class more: a refusal counts as the true
    class, and a target must beat it. With ``beta`` it descends classes and detector side by side instead.

    With ``kappa`` only images whose margin is at least that count: for the bisection and for the result.

    Departures from the paper: 1,000 iterations a constant, not 10,000; the test for progress and the bracket are each
    image's own, where the authors' code sums the objective over the batch; the very first image is the clean one
    itself (its tanh image differs by up to 5e-7), and one adversarial from the start ends there; slopes that are not
    finite count as 0; where no constant succeeds, the last of 10 is the next, not 1e10.

    Args:
        threat: l2 with radius and box; ``eps: inf`` for the nearest image.
        iterations: most of one constant.
        search_steps: constants tried; 1 leaves it as given.
        step_size: of Adam, in tanh space. A black or white pixel lies 7.3 from the middle there, so few iterations
            need longer steps than the paper's 0.01.
        constant: the first c, > 0.
        kappa: least margin of what counts as adversarial, in logits, >= 0; larger ones carry over to other models.
        abort_early: give a constant up without progress. False: run all iterations.
        beta: weight of a detector's own hinge beside that of the classes alone, >= 0; None: one margin for both.
        eot: draws of a random model over which hinge and gradient are averaged.
        stop_at_hit: False keeps on to the end even where the radius is finite.
        seed: of nothing, for this attack draws no random numbers.

    Raises:
        ValueError: an argument out of its range, or a norm other than l2.
    References:
        Carlini & Wagner 2017, https://arxiv.org/abs/1608.04644, sections V and VI-A; numbers and abort test as in the
        authors' code (nn_robust_attacks). Carlini & Wagner 2017, https://arxiv.org/abs/1705.07263 (detectors).
        Li et al. 2020, "Are L2 adversarial examples intrinsically different?", equation (14) (``beta``).
    """

    access = Access.GRADIENT
    minimizes_distance = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("l2", "inf"),  # noqa: B008 - frozen
        iterations: int = 1000,
        search_steps: int = 9,
        step_size: float = 0.01,
        constant: float = 1e-3,
        kappa: float = 0.0,
        abort_early: bool = True,
        beta: float | None = None,
        eot: int | None = None,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm != "l2":
            raise ValueError(f"threat must be in l2, the distance this attack minimises, got {threat.norm!r}: use PGD")
        for name, number in (
            ("iterations", iterations),
            ("search_steps", search_steps),
            ("eot", 1 if eot is None else eot),
        ):
            if number < 1 or number != int(number):
                raise ValueError(f"{name} must be a whole number of at least 1, got {number}")
        for name, value in (("step_size", step_size), ("constant", constant)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        for name, value in (("kappa", kappa), ("beta", beta or 0.0)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        self.threat, self.iterations, self.search_steps, self.step_size = threat, iterations, search_steps, step_size
        self.constant, self.kappa, self.abort_early, self.beta = constant, kappa, abort_early, beta
        self.eot, self.stop_at_hit, self.seed = eot, stop_at_hit, seed
        self.steps, self.confidence = iterations * search_steps, kappa
        self._test_every = max(1, iterations // 10)

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self.eot or 1

    def start(self, search: Search, rows: Tensor) -> CarliniWagnerState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        u = self._origin(x0)
        centre, slope = self._image(u)
        zero = x0.new_zeros(len(rows))
        return CarliniWagnerState(
            **fields, u=u, slope=slope, centre=centre, m=torch.zeros_like(x0), v=torch.zeros_like(x0),
            c=zero + self.constant, lower=zero.clone(), upper=zero + _NO_UPPER, round=torch.zeros_like(rows),
            k=torch.zeros_like(rows), found=torch.zeros_like(fields["done"]), previous=zero + torch.inf,
            best=x0.new_zeros(len(rows), 0) if search.watch else x0.clone(), near=zero + torch.inf,
        )  # fmt: skip

    def _origin(self, x0: Tensor) -> Tensor:
        low, high = self.threat.box
        return ((2 * (x0 - low) / (high - low) - 1) * _EDGE).atanh()

    def _image(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The image of a point, and its derivative by the point."""
        low, high = self.threat.box
        half, tanh = (high - low) / 2, u.tanh()
        slope = tanh.square().neg_().add_(1).mul_(half)
        return tanh.add_(1).mul_(half).add_(low).clamp_(low, high), slope

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, CarliniWagnerState)
        short, won, gradient = self._ask(search, state)
        away = state.x - state.centre
        first = state.t == 0
        if first.any():
            away.masked_fill_(first[:, None, None, None], 0)  # there the clean image itself stands for the centre
        state.found |= won
        if search.watch:  # nothing is nearer than the clean image, and in a radius of 0 nothing else is
            state.done = (search.distance[state.rows] == 0) | (self.threat.radius == 0)
        else:
            _keep_best(state, won)
        stalled = self._stalled(state, away, short)
        self._move(state, away, gradient)
        state.k = state.k + 1
        over = (stalled | (state.k >= self.iterations)) & ~state.done
        if over.any():
            self._next_constant(search, state, over.nonzero().squeeze(1))
        if not search.watch and (state.done | (state.t + 1 >= self.steps)).all():
            state.x = torch.where(state.near.isfinite()[:, None, None, None], state.best, state.x)
            state.t = torch.full_like(state.t, self.steps)
        return state

    def _ask(self, search: Search, state: CarliniWagnerState) -> tuple[Tensor, Tensor, Tensor]:
        """By how much the images fall short, (n,), whether they have won, and the gradient of the former."""
        leaf = state.x.detach().requires_grad_()
        with torch.enable_grad():
            images = leaf.unsqueeze(1).expand(len(leaf), self.eot or 1, *leaf.shape[1:])
            scores = search.scores(images, state)
            short = shortfall(scores, state.y, state.target, search.reject, self.kappa, self.beta).mean(1)
            (gradient,) = torch.autograd.grad(short.sum(), leaf)
        short, dtype = short.detach(), state.x.dtype
        gap = margin(scores.detach(), state.y, state.target, search.reject).mean(1)
        # a hinge at 0 has no slope by right: that is no sign of a model whose gradients tell nothing
        size = gradient.flatten(1).abs().sum(1, keepdim=True)
        examine(search, state, size.masked_fill((short == 0).unsqueeze(1), 1))
        return short.to(dtype), gap >= self.kappa if self.kappa else gap > 0, gradient

    def _stalled(self, state: CarliniWagnerState, away: Tensor, short: Tensor) -> Tensor:
        """Rows whose objective has not fallen since the last test for progress."""
        due = state.k % self._test_every == 0
        if not self.abort_early or not due.any():
            return torch.zeros_like(due)
        objective = away.flatten(1).square().sum(1).add_(state.c * short)
        stalled = due & (objective > 0.9999 * state.previous)
        state.previous = torch.where(due, objective, state.previous)
        return stalled

    def _move(self, state: CarliniWagnerState, away: Tensor, gradient: Tensor) -> None:
        """Adam's step on the objective, whose slope is taken through tanh by hand."""
        slope = gradient.mul_(state.c[:, None, None, None]).add_(away, alpha=2).mul_(state.slope).nan_to_num_(0, 0, 0)
        state.m.lerp_(slope, 1 - _BETAS[0])
        state.v.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
        scale, offset = _corrections(self.iterations, self.step_size, state.x.dtype, state.k.device)
        k = state.k.clamp_max(self.iterations - 1)
        denominator = state.v.sqrt().mul_(scale[k][:, None, None, None]).add_(offset[k][:, None, None, None])
        state.u.addcdiv_(state.m, denominator, value=-1)
        state.x, state.slope = self._image(state.u)

    def _next_constant(self, search: Search, state: CarliniWagnerState, at: Tensor) -> None:
        """Narrow the bracket of rows whose constant is over, and take them back to the clean image."""
        found, c = state.found[at], state.c[at]
        lower = torch.where(found, state.lower[at], torch.maximum(state.lower[at], c))
        upper = torch.where(found, torch.minimum(state.upper[at], c), state.upper[at])
        bounded = upper < _NO_UPPER
        behind = state.round[at] + 1
        c = torch.where(bounded, (lower + upper) / 2, 10 * c)
        if self.search_steps >= 10:
            c = torch.where(bounded & (behind == self.search_steps - 1), upper, c)
        state.lower[at], state.upper[at], state.round[at] = lower, upper, behind
        last = behind >= self.search_steps
        state.done[at] = last
        if last.any():
            search.count("no constant c succeeded", ~bounded[last])
        at = at[~last]
        state.c[at] = c[~last]
        state.u[at] = self._origin(state.x0[at])
        state.x[at], state.slope[at] = self._image(state.u[at])
        state.m[at], state.v[at] = 0, 0
        state.k[at], state.found[at], state.previous[at] = 0, False, torch.inf

    def perturb(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        return self.threat.project(super().perturb(oracle, x, y, target, index), x)


def _keep_best(state: CarliniWagnerState, won: Tensor) -> None:
    near = (state.x - state.x0).flatten(1).square().sum(1)
    better = won & (near < state.near)
    state.near = torch.where(better, near, state.near)
    state.best = torch.where(better[:, None, None, None], state.x, state.best)


@lru_cache(maxsize=64)
def _corrections(steps: int, step_size: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Adam's bias corrections by iteration: its step is ``m / (scale sqrt(v) + offset)``."""
    with torch.inference_mode(False):
        count = torch.arange(1, steps + 1, dtype=torch.float64)
        rate = step_size / (1 - _BETAS[0] ** count)
        scale = 1 / ((1 - _BETAS[1] ** count).sqrt() * rate)
        return scale.to(device, dtype), (_TINY / rate).to(device, dtype)
