"""Auto-PGD: projected gradient ascent with momentum whose step size needs no tuning; APGD-T aims at likely classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

import torch
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.gradients import clean_scores, gradient_of
from lit_adv.losses import Loss, cross_entropy
from lit_adv.oracle import Access
from lit_adv.starts import random_point
from lit_adv.threat import ThreatModel


@dataclass(kw_only=True)
class APGDState(State):
    """Adds what each row remembers of its way.

    Attributes:
        before: (n, C, H, W) the iterate before the current one. value: (n,) its loss.
        best_x, best_gradient: (n, C, H, W) the best point so far and the gradient there. best: (n,) its loss.
        rate: (n,) step size. rose: (n,) how often the loss has risen since the last checkpoint.
        best_then: (n,) the best loss at the last checkpoint. halved: (n,) whether the step size was halved there.
        aim: (n,) the class whose loss is ascended, or None.
    """

    before: Tensor
    value: Tensor
    best_x: Tensor
    best_gradient: Tensor
    best: Tensor
    rate: Tensor
    rose: Tensor
    best_then: Tensor
    halved: Tensor
    aim: Tensor | None


class APGD(IterativeAttack):
    """Momentum steps of steepest ascent, the first ones of ``2 eps``; at a few checkpoints it is seen whether they pay.

    At a checkpoint the step size of a row is halved, and the search goes on from its best point, where the loss rose in
    fewer than ``rho`` of the steps since the last one, or where neither step size nor best loss have changed since.
    A pass is one forward and one backward: the gradient at the best point is kept, so going back to it costs nothing.
    After ``steps`` of them the last point is asked about as a check, so a start is the paper's ``steps + 1`` forwards.

    With ``targets=k`` each start aims at one class (APGD-T): the k likeliest wrong classes of the clean image take
    turns, likeliest first, ``restarts`` times over. The loss is that of the aim; a success is any wrong class all the
    same. An image of fewer wrong classes has fewer starts.

    Of a detector's answers the losses take a refusal for the true class, and ``dlr`` counts it among the logits of its
    denominator too, so that it stays free of shift and scale.

    Args:
        threat: norm (linf, l2 or l1), radius and box.
        steps: gradient steps per start.
        restarts: starts of an unbroken image; with ``targets`` rounds of all its aims.
        loss: what is ascended, see :mod:`lit_adv.losses`.
        targets: classes to aim at in turn; 0: untargeted. Where the caller names targets those are aimed at alone.
        rho: share of steps that must raise the loss between two checkpoints, in (0, 1].
        alpha: weight of the gradient step beside the momentum, in (0, 1]; 1: no momentum.
        random_start: begin at a uniform random point of the ball instead of at the image.
        eot: draws of a random model over which loss and gradient are averaged; None: 1, or 20 where it says that it is.
        stop_at_hit: False runs all steps of every image.
        seed: of the random starts.

    Raises:
        ValueError: an argument out of its range.
    References:
        Croce & Hein 2020, https://arxiv.org/abs/2003.01690, algorithm 1, sections 3 and 4. The start: the paper leaves
        it open, the authors' program scales a random point to the surface of the ball; here it is uniform in it. Their
        program also looks at a checkpoint one step earlier than algorithm 1, which is followed here. In l1 the step is
        along one coordinate; their later method for l1 (https://arxiv.org/abs/2103.01208) is another one.
    """

    access = Access.GRADIENT

    def __init__(
        self,
        threat: ThreatModel = ThreatModel(),  # noqa: B008 - frozen
        steps: int = 100,
        restarts: int = 1,
        loss: Loss = cross_entropy,
        targets: int = 0,
        rho: float = 0.75,
        alpha: float = 0.75,
        random_start: bool = True,
        eot: int | None = None,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm == "l0" or not isfinite(threat.radius):
            raise ValueError(
                "threat must be a ball of finite eps in linf, l2 or l1, for the first step is 2 eps long, got "
                f"{threat}: PGD takes a step size of its own"
            )
        if steps < 1 or restarts < 1 or steps != int(steps):
            raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
        if targets < 0 or targets != int(targets):
            raise ValueError(f"targets must be a number of classes to aim at, or 0 for none, got {targets}")
        for name, share in (("rho", rho), ("alpha", alpha)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}: the paper's value is 0.75")
        if eot is not None and eot < 1:
            raise ValueError(f"eot must be at least 1 draw, or None to leave it to the model, got {eot}")
        self.threat, self.steps, self.restarts, self.loss, self.targets = threat, steps, restarts, loss, targets
        self.rho, self.alpha, self.random_start = rho, alpha, random_start
        self.eot, self.stop_at_hit, self.seed = eot, stop_at_hit, seed
        self.looks_first = random_start

    def adapted(self, stochastic: bool) -> APGD:
        """At work every aim is a start of its own; the constructor's ``restarts`` stays what it was."""
        other = copy.copy(super().adapted(stochastic))
        other.restarts = self.restarts * max(1, self.targets)
        return other

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self.eot or 1

    def start(self, search: Search, rows: Tensor) -> APGDState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        if self.targets:
            aim, none_left = self._aims(search, rows)
            fields["done"] = none_left
        else:
            aim = fields["target"]
        if self.random_start:
            fields["x"] = random_point(self.threat, x0, search.starting_draws(rows))
        lowest = x0.new_full((len(x0),), -torch.inf)
        return APGDState(
            **fields,
            before=fields["x"],
            value=lowest,
            best_x=fields["x"],
            best_gradient=torch.zeros_like(x0),
            best=lowest,
            rate=torch.full_like(lowest, 2 * self.threat.radius),
            rose=torch.zeros_like(rows),
            best_then=lowest,
            halved=torch.ones_like(fields["done"]),  # at the first checkpoint there is no earlier best to compare with
            aim=aim,
        )

    def _aims(self, search: Search, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The class that each row aims at in this start, (n,), and which rows have none left, (n,) bool."""
        turn = search.restart[rows]
        if search.target is not None:
            return search.target[rows], turn >= self.restarts // self.targets
        scores = clean_scores(search, rows, self.cost(search.x0.shape[1:]))
        if scores.shape[1] < 2:  # nothing could be asked yet
            return torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
        unknown = scores.isnan().any(1)
        others = scores.scatter(1, search.y[rows].unsqueeze(1), -torch.inf)
        if search.reject is not None:
            others[:, search.reject] = -torch.inf
        wrong = scores.shape[1] - (1 if search.reject is None else 2)
        place = turn % self.targets
        ranking = others.argsort(dim=1, descending=True, stable=True)
        aim = ranking.gather(1, place.clamp_max(max(0, wrong - 1)).unsqueeze(1)).squeeze(1)
        return aim, unknown | (place >= wrong)

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, APGDState)

        def loss(scores: Tensor) -> Tensor:
            return self.loss(scores, state.y, state.aim, search.reject)

        value, gradient, _ = gradient_of(search, state, loss, self.eot or 1)
        value = value.to(state.value.dtype)
        better = value > state.best  # False for NaN
        state.best = torch.where(better, value, state.best)
        state.best_x = _where(better, state.x, state.best_x)
        state.best_gradient = _where(better, gradient, state.best_gradient)
        value, gradient = self._check(state, value, gradient)
        state.rose = state.rose + (value > state.value)
        state.value = value
        self._move(state, gradient)
        if not search.watch:  # nobody else keeps the best point
            state.x = _where(state.t + 1 >= self.steps, state.best_x, state.x)
        return state

    def _check(self, state: APGDState, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Halve the step size and go back to the best point where a checkpoint says so; loss and gradient there."""
        span = _spans(self.steps, state.t.device)[state.t]
        due = span >= 0
        if not due.any():
            return value, gradient
        stuck = (state.rose < self.rho * span) | (~state.halved & (state.best <= state.best_then))
        back = due & stuck
        state.rate = torch.where(back, state.rate / 2, state.rate)
        state.x = _where(back, state.best_x, state.x)
        state.best_then = torch.where(due, state.best, state.best_then)
        state.halved = torch.where(due, back, state.halved)
        state.rose = state.rose.masked_fill(due, 0)
        return torch.where(back, state.best, value), _where(back, state.best_gradient, gradient)

    def _move(self, state: APGDState, gradient: Tensor) -> None:
        """The projected step of the gradient, weighed against the last movement; the first has no momentum."""
        project = self._projection(state.x0)
        there = self.threat.steepest(gradient).mul_(state.rate[:, None, None, None]).add_(state.x)
        momentum = torch.where(state.t == 0, 0.0, 1 - self.alpha).to(there.dtype)[:, None, None, None]
        mixed = project(there).lerp_(state.x, momentum)
        mixed.add_(state.x - state.before, alpha=1 - self.alpha)
        state.x, state.before = project(mixed), state.x

    def _projection(self, x0: Tensor) -> Callable[[Tensor], Tensor]:
        """Into ball and box around these images, of tensors that nobody else holds.

        In linf the bounds are made once for both projections of a step: on a small network it shows.
        """
        if self.threat.norm != "linf":
            return lambda x: self.threat.project(x, x0)
        low, high = self.threat.box
        lower = (x0 - self.threat.radius).clamp_min_(low)
        upper = (x0 + self.threat.radius).clamp_max_(high)
        return lambda x: x.clamp_(lower, upper)


def _where(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], new, old)


def checkpoints(steps: int) -> list[int]:
    """The steps ``w_0 < w_1 < ...`` at which the step size is looked at.

    ``w_j = ceil(p_j steps)`` with ``p_0 = 0``, ``p_1 = 0.22`` and ``p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06)``,
    in whole per cent, for in floating point ``0.41 + 0.16`` is more than 0.57.
    """
    share, gap, found = 0, 22, []
    while share <= 100:
        found.append(-(-share * steps // 100))
        share, gap = share + gap, max(gap - 3, 6)
    return sorted(set(found))


@lru_cache(maxsize=64)
def _spans(steps: int, device: torch.device) -> Tensor:
    """By step: how many steps lie between the two last checkpoints, where one is looked at then; else -1.

    The checkpoint at step ``w`` is looked at when iterate ``w + 1`` has been asked about, as in algorithm 1.
    """
    with torch.inference_mode(False):
        spans = torch.full((steps + 2,), -1)
        at = torch.tensor(checkpoints(steps))
        spans[at + 1] = at.diff(prepend=at[:1])
        return spans.to(device)
