"""DDN: the nearest adversarial image by steps whose direction and length are decoupled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.gradients import gradient_of
from lit_adv.losses import Loss, cross_entropy, is_adversarial
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

_LAST_STEP = 0.01  # the cosine's end, from the authors' code


@dataclass(kw_only=True)
class DDNState(State):
    """Adds the radius of each row's sphere, and what limits it.

    Attributes:
        length: (n,) of the sphere on which the image lies. worst: (n,) that of the farthest corner of the box.
        best: the nearest own adversarial image and near: (n,) its distance; kept in training alone, where no search
            is watching, else empty.
        last: (n,) distance when it last fell by 0.1 % or more. idle: (n,) steps since then.
    """

    length: Tensor
    worst: Tensor
    best: Tensor
    near: Tensor
    last: Tensor
    idle: Tensor


class DDN(IterativeAttack):
    """Gradient steps on a sphere around the image, which shrinks where they have won and grows where they have not.

    A step asks about the image, goes by ``alpha`` along the normalised gradient (from ``step_size`` to 0.01 by half a
    cosine), moves the radius by the factor ``1 - gamma`` where the image was adversarial, else ``1 + gamma``, and puts
    the image onto that sphere, into the box and (with the threat model's ``levels``) onto the grid of pixel values. The
    first image is the clean one. The nearest adversarial image is kept; with a finite radius and ``stop_at_hit`` a row
    ends at its first within it. All other rows run all steps, for a radius that hovers may fall again, unless
    ``patience`` says when an image has converged. One query a step, ``eot`` of them for a random model.

    Departures: a direction is drawn at random where the gradient is exactly 0 or not finite, as in the authors' first
    code; their later bound of 1e-12 would throw away what a saturated network still tells. It is scaled to length 1.

    Args:
        threat: l2 with radius and box; ``eps: inf`` for the nearest image, ``levels: 255`` for 8-bit images.
        steps: gradient steps.
        gamma: share by which the radius changes in a step, in (0, 1).
        initial: first radius, pixel units.
        step_size: of the first step, pixel units.
        loss: what is ascended, see :mod:`lit_adv.losses`.
        patience: steps after which an image leaves whose nearest adversarial one has not come nearer by 0.1 %; None:
            it takes all steps, as in the paper.
        eot: draws of a random model over which gradients and scores are averaged.
        stop_at_hit: False keeps on to the end even where the radius is finite.
        seed: of the random directions.

    Raises:
        ValueError: an argument out of its range, or a norm other than l2.
    References:
        Rony et al. 2019, https://arxiv.org/abs/1811.09600, algorithm 1 and section 5 (100 steps, gamma 0.05, first
        radius 1; the cosine from 1 to 0.01).
    """

    access = Access.GRADIENT
    minimizes_distance = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("l2", "inf"),  # noqa: B008 - frozen
        steps: int = 100,
        gamma: float = 0.05,
        initial: float = 1.0,
        step_size: float = 1.0,
        loss: Loss = cross_entropy,
        patience: int | None = None,
        eot: int | None = None,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm != "l2":
            raise ValueError(f"threat must be in l2, the distance this attack minimises, got {threat.norm!r}: use PGD")
        whole = {"steps": steps, "eot": 1 if eot is None else eot, "patience": 1 if patience is None else patience}
        for name, number in whole.items():
            if number < 1 or number != int(number):
                raise ValueError(f"{name} must be a whole number of at least 1, got {number}")
        if not 0 < gamma < 1:
            raise ValueError(f"gamma must be in (0, 1), got {gamma}: the paper's value is 0.05")
        for name, value in (("initial", initial), ("step_size", step_size)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite length > 0 in pixel units, got {value}")
        self.threat, self.steps, self.gamma, self.initial, self.step_size = threat, steps, gamma, initial, step_size
        self.loss, self.patience, self.eot, self.stop_at_hit, self.seed = loss, patience, eot, stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self.eot or 1

    def start(self, search: Search, rows: Tensor) -> DDNState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        low, high = self.threat.box
        worst = torch.maximum(x0 - low, high - x0).flatten(1).norm(dim=1)
        return DDNState(
            **fields,
            length=torch.full_like(worst, self.initial),
            worst=worst,
            best=x0.new_zeros(len(rows), 0) if search.watch else x0.clone(),
            near=torch.full_like(worst, torch.inf),
            last=torch.full_like(worst, torch.inf),
            idle=torch.zeros_like(rows),
        )

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, DDNState)

        def loss(scores: Tensor) -> Tensor:
            return self.loss(scores, state.y, state.target, search.reject)

        _, gradient, scores = gradient_of(search, state, loss, self.eot or 1)
        scores = scores.mean(1)
        won = is_adversarial(scores.argmax(-1), state.y, state.target, search.reject) & ~scores.isnan().any(-1)
        if search.watch:  # nothing is nearer than the clean image, and in a radius of 0 nothing else is
            state.done = (search.distance[state.rows] == 0) | (self.threat.radius == 0)
            if self.patience is not None:
                state.done |= self._converged(state, search.distance[state.rows], self.patience)
        else:
            near = self.threat.distance(state.x, state.x0)
            better = won & (near < state.near)
            state.near = torch.where(better, near, state.near)
            state.best = torch.where(better[:, None, None, None], state.x, state.best)
        self._move(search, state, gradient, won)
        if not search.watch:
            at_end = (state.t + 1 >= self.steps) & state.near.isfinite()
            state.x = torch.where(at_end[:, None, None, None], state.best, state.x)
        return state

    def _converged(self, state: DDNState, distance: Tensor, patience: int) -> Tensor:
        nearer = distance < 0.999 * state.last
        state.last = torch.where(nearer, distance, state.last)
        state.idle = torch.where(nearer | distance.isinf(), 0, state.idle + 1)
        return state.idle >= patience

    def _move(self, search: Search, state: DDNState, gradient: Tensor, won: Tensor) -> None:
        """A step along the gradient, then onto the sphere."""
        direction = self.threat.steepest(gradient)
        lost = ~direction.flatten(1).any(1)
        if lost.any():
            noise = search.draws(state).normal(*state.x.shape[1:], dtype=state.x.dtype)
            direction = torch.where(lost[:, None, None, None], self.threat.steepest(noise), direction)
        turn = (state.t.double() * (math.pi / self.steps)).cos().add_(1).mul_((self.step_size - _LAST_STEP) / 2)
        alpha = turn.add_(_LAST_STEP).to(state.x.dtype)
        delta = (state.x - state.x0).addcmul_(direction, alpha[:, None, None, None])
        factor = 1 + self.gamma - 2 * self.gamma * won.to(state.length.dtype)
        state.length = torch.minimum(state.length * factor, state.worst)
        size = delta.flatten(1).norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
        x = delta.mul_((state.length / size)[:, None, None, None]).add_(state.x0).clamp_(*self.threat.box)
        levels = self.threat.levels
        state.x = x if levels is None else x.mul_(levels).round_().div_(levels)

    def perturb(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        return self.threat.project(super().perturb(oracle, x, y, target, index), x)
