"""FAB: the nearest adversarial image by projections onto the boundary's planes, drawn towards the clean image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.draws import Draws
from lit_adv.hyperplanes import Planes, nearest_planes, noticed, rivals_at, step_onto
from lit_adv.losses import is_adversarial, margin
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel, norm_of

_SLACK = 1e-3  # of the distance, beyond the boundary: what the final search aims at is no matter of rounding


@dataclass(kw_only=True)
class FABState(State):
    """Adds the classes looked at, the nearest image of all starts, and the final search.

    Attributes:
        rivals: (n, k) classes. best: (n, C, H, W) the nearest adversarial image, near: (n,) its distance, inf if none.
        phase: (n,) number of the final step, 0 before.
        low, aim: (n,) places on the line from the clean image (0) to the best one (1): the farthest known not to be
            adversarial, and the one asked next. value: (n, 2) margins at ``low`` and at the best image; NaN where
            this start has found nothing better than those before it.
    """

    rivals: Tensor
    best: Tensor
    near: Tensor
    phase: Tensor
    low: Tensor
    aim: Tensor
    value: Tensor


class FAB(IterativeAttack):
    """Fast adaptive boundary attack: searches the nearest adversarial image.

    In each step the nearest of the planes that bound the label's region, linearised at x, is taken for the boundary,
    and both x and the clean image x0 are projected onto it within the box; with their displacements d and d0,
    ``x <- (1 - alpha) (x + eta d) + alpha (x0 + eta d0)``, cut to the box, ``alpha = min(|d| / (|d| + |d0|),
    alpha_max)``. An adversarial x is first drawn back to ``(1 - beta) x0 + beta x``. At the end a secant search goes
    from the nearest image found towards x0. With a finite radius and ``stop_at_hit`` a row ends at its first hit
    inside, else it takes all steps and keeps the nearest.

    A targeted row has one plane, between its target and the strongest other class. A detector's refusal counts as the
    label where it speaks louder.

    Departures from the paper: the plane at an adversarial image serves the image drawn back from it too, which is
    asked nothing itself, so a step costs one query rather than two; the final search aims 0.1 % of the distance beyond
    the boundary, clear of rounding; only the classes likeliest at the clean image are looked at, which is asked once
    more for that, as a check; where the threat rounds to levels no step is so short that rounding undoes it.

    Args:
        threat: norm (linf, l2), radius and box; ``"inf"`` for the nearest image.
        steps: projections of a start.
        restarts: starts, while an image is unbroken within the radius or the nearest one is sought: the first at x0,
            later ones at random half as far away as the nearest image so far, or as the radius if that is less.
        alpha_max: largest weight of the clean image's way, in [0, 1].
        eta: length of the ways in terms of the projections', at least 1.
        beta: share of its distance that an adversarial image keeps, in (0, 1].
        final_steps: queries of the final search; 0: none.
        classes: most classes looked at, the label among them; each but the label costs a backward pass a step.
        eot: draws of a random model over which gradients and scores are averaged.
        stop_at_hit: False keeps on to the end even where the radius is finite.
        seed: of the restarts.

    Raises:
        ValueError: an argument out of its range, or a norm without a rule.
    References:
        Croce & Hein 2020, https://arxiv.org/abs/1907.02044, algorithm 1, with the paragraphs on the backward step,
        the final search and random restarts.
    """

    access = Access.GRADIENT
    minimizes_distance = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel(),  # noqa: B008 - frozen
        steps: int = 100,
        restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        final_steps: int = 3,
        classes: int = 10,
        eot: int | None = None,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm not in ("linf", "l2"):
            raise ValueError(f"FAB has projections for linf and l2, got norm {threat.norm!r}: choose one of them")
        counts = {"steps": (steps, 1), "restarts": (restarts, 1), "final_steps": (final_steps, 0)}
        counts |= {"classes": (classes, 2), "eot": (1 if eot is None else eot, 1)}
        for name, (value, least) in counts.items():
            if value < least or value != int(value):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")
        if not 0 <= alpha_max <= 1 or not 0 < beta <= 1:
            raise ValueError(f"alpha_max must lie in [0, 1] and beta in (0, 1], got {alpha_max} and {beta}")
        if not 1 <= eta < math.inf:
            raise ValueError(f"eta must be a finite number >= 1 (the paper's: 1.05), got {eta}")
        self.threat, self.steps, self.restarts, self.alpha_max = threat, steps, restarts, alpha_max
        self.eta, self.beta, self.final_steps, self.classes = eta, beta, final_steps, classes
        self.eot, self.stop_at_hit, self.seed = eot, stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self.eot or 1

    def start(self, search: Search, rows: Tensor) -> FABState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        rivals, clean, unknown = rivals_at(search, rows, self.classes, self.eot or 1)
        near, best = x0.new_full((len(x0),), torch.inf), x0.clone()
        if search.watch:
            near, best = search.distance[rows].to(x0.dtype), search.x_adv[rows].to(x0.dtype)
        again = (search.restart[rows] > 0).nonzero().squeeze(1)
        if len(again):
            draws = search.starting_draws(rows[again])
            fields["x"][again] = beginning(self.threat, x0[again], near[again], draws)
        fields["done"] = unknown | (self.threat.radius == 0) | (near == 0)
        value = torch.stack([clean.to(x0.dtype), torch.full_like(near, torch.nan)], 1)
        phase, zero = torch.zeros_like(rows), torch.zeros_like(near)
        return FABState(
            **fields, rivals=rivals, best=best, near=near, phase=phase, low=zero, aim=zero.clone(), value=value
        )

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, FABState)
        going = ~state.done & (state.t < self.steps)
        state.inside = torch.zeros_like(going)
        final = state.phase > 0
        for chosen, pass_of in ((going & ~final, self._project), (going & final, self._finish)):
            at = chosen.nonzero().squeeze(1)
            if len(at) == len(state):
                pass_of(search, state)
            elif len(at):
                part = state[at]
                pass_of(search, part)
                _put(state, at, part)
        return state

    def _project(self, search: Search, state: FABState) -> None:
        """A step of rows still before the final search."""
        planes = nearest_planes(search, state, state.rivals, self.eot or 1)
        found = self._better(search, state, planes.won)
        state.best = torch.where(found[:, None, None, None], state.x, state.best)
        state.value[:, 1] = torch.where(found, planes.margin, state.value[:, 1])
        x = self._moved(state, planes)
        stuck = (x == state.x).flatten(1).all(1)
        if search.oracle.stochastic:  # the next draw may lead on
            stuck = torch.zeros_like(stuck)
        over = stuck | (state.t + 1 >= self.steps)
        # a row at its end stands at the best image; one without is asked about its last step by the loop
        state.x = torch.where((over & state.near.isfinite())[:, None, None, None], state.best, x)
        self._aim(state, over & state.value[:, 1].isfinite())
        state.done = stuck & ~state.inside

    def _moved(self, state: FABState, planes: Planes) -> Tensor:
        """The next images."""
        x0 = state.x0
        x = torch.where(planes.won[:, None, None, None], torch.lerp(x0, state.x, self.beta), state.x)
        gaps = [planes.gap + (planes.normal * (z - state.x)).flatten(1).sum(1) for z in (x, x0)]
        ways = [
            noticed(self.threat, step_onto(self.threat, z, planes.normal, gap))
            for z, gap in zip((x, x0), gaps, strict=True)
        ]
        here, there = (norm_of(way.flatten(1), self.threat.norm) for way in ways)
        alpha = (here / (here + there).clamp_min(1e-30)).clamp_max(self.alpha_max)[:, None, None, None]
        moved = torch.lerp(x + self.eta * ways[0], x0 + self.eta * ways[1], alpha)
        return torch.where(planes.distance.isfinite()[:, None, None, None], moved, x).clamp(*self.threat.box)

    def _finish(self, search: Search, state: FABState) -> None:
        """A step of the final search, a secant search that always keeps one end on either side of the boundary."""
        images = state.x.unsqueeze(1).expand(-1, self.eot or 1, -1, -1, -1)
        scores = search.scores(images, state).mean(1)
        won = is_adversarial(scores.argmax(1), state.y, state.target, search.reject) & ~scores.isnan().any(1)
        value = margin(scores, state.y, state.target, search.reject).to(state.value.dtype)
        found = self._better(search, state, won)
        state.best = torch.where(found[:, None, None, None], state.x, state.best)
        state.low = torch.where(found, state.low / state.aim, state.aim)
        state.value = torch.where(torch.stack([~found, found], 1), value[:, None], state.value)
        state.x = state.best
        self._aim(state, torch.ones_like(found))
        state.done = ~state.inside & (state.t + 1 < self.steps)

    def _aim(self, state: FABState, rows: Tensor) -> None:
        """Begin a step of the final search where there is something to gain: set where it asks.

        That is where the margin would be 0 if it were linear between the ends, and a little beyond.
        """
        part = state.value[:, 1] / (state.value[:, 1] - state.value[:, 0])
        part = torch.where((part > 0) & (part < 1), part, 0.5)  # a random model's margins need not have the signs
        state.aim = 1 - part * (1 - state.low) + _SLACK
        state.inside = rows & (state.phase < self.final_steps) & (state.aim < 1)
        state.phase = state.phase + state.inside
        line = torch.lerp(state.x0, state.best, state.aim[:, None, None, None])
        state.x = torch.where(state.inside[:, None, None, None], line, state.x)

    def _better(self, search: Search, state: FABState, won: Tensor) -> Tensor:
        """Whether the images just asked are the nearest of their rows, (n,) bool; if so their distance is noted."""
        if search.watch:
            near = search.distance[state.rows].to(state.near.dtype)  # of hits that count: those are confirmed
        else:
            near = torch.where(won, self.threat.distance(state.x, state.x0), torch.inf)
        found = near < state.near
        state.near = torch.minimum(near, state.near)
        return found

    def perturb(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        return self.threat.project(super().perturb(oracle, x, y, target, index), x)


def beginning(threat: ThreatModel, x0: Tensor, near: Tensor, draws: Draws) -> Tensor:
    """A random image half as far away as ``near`` (n,) or the radius, whichever is less, cut to the box.

    Its direction is uniform in linf's cube or in l2; where neither limits it, half as far as the box's far corner.
    """
    low, high = threat.box
    corner = torch.where(x0 - low > high - x0, low, high)
    away = torch.minimum(near, threat.distance(corner, x0)).clamp_max(threat.radius) / 2
    if threat.norm == "linf":
        noise = draws.uniform(*x0.shape[1:], low=-1, high=1, dtype=x0.dtype)
    else:
        noise = draws.normal(*x0.shape[1:], dtype=x0.dtype)
    length = norm_of(noise.flatten(1), threat.norm).clamp_min(1e-12)
    return (x0 + (away / length)[:, None, None, None] * noise).clamp(low, high)


def _put(state: FABState, at: Tensor, part: FABState) -> None:
    """Write rows that were worked on apart back to their places."""
    for name in ("x", "done", "inside", "best", "near", "phase", "low", "aim", "value"):
        setattr(state, name, getattr(state, name).index_put((at,), getattr(part, name)))
