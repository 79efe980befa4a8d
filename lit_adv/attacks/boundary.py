"""Boundary attack: a random walk along the decision boundary towards the image, told nothing but labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.oracle import Access, QueryOracle
from lit_adv.parts import part_of, places_of, rows_of, wide, won_by
from lit_adv.threat import ThreatModel

Starts = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x0 (n, C, H, W), y (n,), target (n,) or None) -> (n, C, H, W)``: images to begin at, row by row."""

TRY, BLEND, WALK = range(3)  # what a row is about to ask
_STEPS, _TRIES = 0, 1  # keys of the random numbers
_SPHERE, _SOURCE = 100, 30  # outcomes that are remembered of either step
_BLENDED = 1e-3  # share of the noise to which the first blend is bisected


@dataclass(kw_only=True)
class BoundaryState(State):
    """Adds what a row is at, and how its steps have fared; ``x`` is adversarial from the first hit on.

    Attributes:
        phase: (n,) one of the three. number: (n,) tries asked. size: (n,) images asked about in the next pass.
        low: (n,) float64 lower end of the first bisection. high: the upper end, adversarial.
        rates: (n, 2) step sizes along the sphere and towards the image, shares of the distance.
        outcomes: (n, 130) bool, rings of the last 100 outcomes on the sphere and 30 of whole steps.
        seen: (n, 2) outcomes noted in either since it was last emptied.
    """

    phase: Tensor
    number: Tensor
    size: Tensor
    low: Tensor
    high: Tensor
    rates: Tensor
    outcomes: Tensor
    seen: Tensor


class Boundary(IterativeAttack):
    """Keeps an adversarial image and moves it by a random step on the sphere around the clean image, then inwards.

    A row begins at uniform noise that is adversarial, blended with the image by bisection. Each step asks one image,
    which replaces the present one if it is adversarial and nearer; every tenth step asks beside it where the step on
    the sphere led, and from such outcomes both step sizes are adapted. The nearest adversarial image is kept.

    Departures from the reference implementation: the first blend is found by bisection, not on a grid of 50 shares;
    adversarial means other than the true label; after 16 tries for a beginning the next eighth of their number is
    asked at once.

    Args:
        threat: norm (l2), radius and box; ``"inf"``: the nearest image whatever its distance.
        steps: most steps.
        spherical_step: first step along the sphere, share of the distance.
        source_step: first step towards the image, share of the distance.
        adaptation: factor by which step sizes grow and shrink.
        converged: a row ends once its step towards the image is below this share.
        check_every: steps between questions about the sphere.
        init_tries: most images of uniform noise asked in search of a beginning; where none is adversarial the image
            has failed.
        starts: gives images to begin at, e.g. of the target's class; one that is not adversarial is followed by noise.
        block: most tries per image in one forward.
        stop_at_hit: False runs all steps and keeps the nearest, also within a finite radius.
        seed: of noise and steps.

    Raises:
        ValueError: an argument out of its range, or a norm without a rule.
    References:
        Brendel, Rauber & Bethge 2018, https://arxiv.org/abs/1712.04248, algorithm 1 and section 2. The figures of the
        adaptation (rates above 0.5 and 0.25 grow, below 0.2 and 0.1 shrink) and 25,000 steps are those of the
        authors' implementation in Foolbox.
    """

    access = Access.LABEL
    looks_first = True
    minimizes_distance = True
    needs_whole_step = False

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("l2", "inf"),  # noqa: B008 - frozen
        steps: int = 25000,
        spherical_step: float = 0.01,
        source_step: float = 0.01,
        adaptation: float = 1.5,
        converged: float = 1e-7,
        check_every: int = 10,
        init_tries: int = 1000,
        starts: Starts | None = None,
        block: int = 32,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm != "l2":
            raise ValueError(f"Boundary has a rule for l2, got norm {threat.norm!r}: choose l2, or HopSkipJump")
        counts = {"steps": steps, "check_every": check_every, "init_tries": init_tries, "block": block}
        for name, value in counts.items():
            if value < 1 or value != int(value):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        for name, share in {"spherical_step": spherical_step, "source_step": source_step}.items():
            if not 0 < share < math.inf:
                raise ValueError(f"{name} must be a finite share > 0 of the distance, e.g. 0.01, got {share}")
        if not 1 < adaptation < math.inf or not converged >= 0:
            raise ValueError(f"adaptation must be finite and > 1, converged >= 0, got {adaptation} and {converged}")
        self.threat, self.steps, self.adaptation, self.converged = threat, steps, adaptation, converged
        self.spherical_step, self.source_step, self.check_every = spherical_step, source_step, check_every
        self.init_tries, self.starts, self.block = init_tries, starts, block
        self.stop_at_hit, self.seed = stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        return state.size if isinstance(state, BoundaryState) else 1

    def start(self, search: Search, rows: Tensor) -> BoundaryState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        number = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        # rows are written to in place: nothing may be shared between fields
        fields |= {"x": x0.clone(), "inside": fields["inside"].clone()}
        fields["done"] = torch.full_like(fields["done"], self.threat.radius == 0)
        return BoundaryState(
            **fields,
            phase=torch.full_like(rows, TRY),
            number=torch.zeros_like(rows),
            size=torch.ones_like(rows),
            low=number,
            high=number.clone(),
            rates=number.new_tensor([self.spherical_step, self.source_step]).repeat(len(rows), 1),
            outcomes=torch.zeros(len(rows), _SPHERE + _SOURCE, dtype=torch.bool, device=rows.device),
            seen=rows.new_zeros(len(rows), 2),
        )

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, BoundaryState)
        state.inside = (state.phase != WALK) & ~state.done
        if bool(state.inside.any()):
            self._begin(search, state)
        walking = places_of((state.phase == WALK) & ~state.inside & ~state.done)
        if len(walking):
            self._walk(search, state, walking)
        state.size = self._sizes(state)
        return state

    def _sizes(self, state: BoundaryState) -> Tensor:
        """Images that each row asks about in its next pass: (n,)."""
        size = torch.ones_like(state.number)
        trying = places_of((state.phase == TRY) & (state.number >= 16))
        if len(trying):
            number = state.number[trying]
            size[trying] = (number // 8).clamp_max(self.block).minimum(self.init_tries - number).clamp_min(1)
        return size

    def _begin(self, search: Search, state: BoundaryState) -> None:
        """Ask for the rows that have no image yet to walk from."""
        trying = state.inside & (state.phase == TRY)
        for group in (trying & (state.size == 1), trying & (state.size > 1)):  # few at first: most hit at once
            rows = places_of(group)
            if len(rows):
                self._try(search, state, rows)
        rows = places_of(state.inside & (state.phase == BLEND) & ~trying)
        if len(rows):
            self._blend(search, state, rows)

    def _try(self, search: Search, state: BoundaryState, rows: Tensor) -> None:
        """Ask about the next images in search of a beginning; give up after the last."""
        part, size = part_of(state, rows), state.size[rows]
        images = self._tries(search, part, state.number[rows], int(size.max()))
        asked = torch.arange(images.shape[1], device=rows.device) < size[:, None]
        won = won_by(search.label(images, part, asked=asked), part, search)
        state.number[rows] += size
        found = won.any(1)
        state.done[rows] = ~found & (state.number[rows] >= self.init_tries)
        begun = rows[found]
        if len(begun):
            state.x[begun] = images[found, won[found].int().argmax(1)]
            state.phase[begun], state.low[begun], state.high[begun] = BLEND, 0.0, 1.0

    def _tries(self, search: Search, part: State, number: Tensor, width: int) -> Tensor:
        low, high = self.threat.box
        draws, shape = search.draws(part, key=_TRIES), part.x0.shape[1:]
        images = draws.uniform(width, *shape, first=number, low=low, high=high, dtype=part.x0.dtype)
        first = places_of(number == 0)
        if self.starts is not None and len(first):
            target = None if part.target is None else part.target[first]
            given = self.starts(part.x0[first], part.y[first], target)
            if given.shape != part.x0[first].shape:
                wanted = tuple(part.x0[first].shape)
                raise ValueError(f"starts must give one image for each, shape {wanted}, got {tuple(given.shape)}")
            images[first, 0] = given.to(images).clamp(low, high)
        return images

    def _blend(self, search: Search, state: BoundaryState, rows: Tensor) -> None:
        """Bisect between the image and the noise; walk from where the two ends are close."""
        part, x = part_of(state, rows), state.x[rows]
        middle = (state.low[rows] + state.high[rows]) / 2
        won = won_by(search.label(torch.lerp(part.x0, x, wide(middle, x)), part), part, search)
        low, high = torch.where(won, state.low[rows], middle), torch.where(won, middle, state.high[rows])
        state.low[rows], state.high[rows] = low, high
        near = high - low <= _BLENDED
        state.x[rows[near]] = torch.lerp(part.x0[near], x[near], wide(high[near], x))
        state.phase[rows[near]] = WALK

    def _walk(self, search: Search, state: BoundaryState, rows: Tensor) -> None:
        """Ask about a step of every row, and at times about the sphere it passes."""
        part, x, rates = part_of(state, rows), rows_of(state.x, rows), rows_of(state.rates, rows)
        sphere, images, nearer = self._steps(search, part, x, rates)
        won = won_by(search.label(images, part), part, search)
        moved = won & nearer
        due = (part.t + 1) % self.check_every == 0
        if len(rows) == len(state):
            state.x = torch.where(moved[:, None, None, None], images, x)
        else:
            state.x[rows[moved]] = images[moved]
        if bool(due.any()):
            places = places_of(due & (search.oracle.remaining(part.rows) > 0) & ~search.won(part))
            if len(places):
                asking = part[places]
                spherical = won_by(search.label(sphere[places], asking), asking, search)
                self._adapt(state, rows[places], torch.stack([spherical, won[places]], 1))

    def _steps(self, search: Search, part: State, x: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images on the sphere through ``x`` and further in, (n, C, H, W), and whether these are nearer.

        With d the way to the clean image, r its length and e noise orthogonal to it of length ``spherical r``, the
        first is ``x0 + (e - d) / sqrt(1 + spherical^2)``. The second lies ``source r`` nearer, and as much more as
        the box may have left the first outside the sphere.
        """
        draws, low_high = search.draws(part, key=_STEPS), self.threat.box
        way = part.x0 - x
        noise = draws.normal(1, *x.shape[1:], first=torch.zeros_like(part.rows), dtype=x.dtype).squeeze(1)
        flat, flat_way = noise.flatten(1), way.flatten(1)
        radius = flat_way.norm(dim=1).clamp_min(1e-30)
        along = torch.linalg.vecdot(flat, flat_way) / radius
        across = (torch.linalg.vecdot(flat, flat) - along * along).clamp_min(1e-30).sqrt()
        spherical, source = rates.to(x.dtype).unbind(1)
        shrink = 1 / (1 + spherical * spherical).sqrt()
        factor = shrink * spherical * radius / across
        noise.mul_(wide(factor, x)).sub_(way.mul_(wide(shrink + factor * along / radius, x)))
        sphere = noise.add_(part.x0).clamp_(*low_high)
        inward = torch.sub(part.x0, sphere, out=way)
        length = inward.flatten(1).norm(dim=1).clamp_min(1e-30)
        share = ((source * radius + length - radius) / length).clamp(0, 1)
        images = torch.addcmul(sphere, inward, wide(share, x), out=inward)
        return sphere, images, (1 - share) * length < radius

    def _adapt(self, state: BoundaryState, rows: Tensor, won: Tensor) -> None:
        """Note both outcomes; where a ring is full and its rate far from the wanted one, change the step sizes."""
        outcomes, seen, rates = state.outcomes[rows], state.seen[rows], state.rates[rows]
        sizes = torch.tensor([_SPHERE, _SOURCE], device=rows.device)
        outcomes.scatter_(1, seen % sizes + torch.tensor([0, _SPHERE], device=rows.device), won)
        seen += 1
        parts = torch.split(outcomes.double(), [_SPHERE, _SOURCE], 1)
        rate = torch.stack([part.mean(1) for part in parts], 1)
        full = seen >= sizes
        grown = full & (rate > rate.new_tensor([0.5, 0.25]))
        shrunk = full & (rate < rate.new_tensor([0.2, 0.1]))
        factor = torch.ones_like(rates).masked_fill_(grown, self.adaptation).masked_fill_(shrunk, 1 / self.adaptation)
        rates[:, 0] *= factor[:, 0]
        rates[:, 1] *= factor[:, 0] * factor[:, 1]
        state.outcomes[rows], state.rates[rows] = outcomes, rates
        state.seen[rows] = seen.masked_fill(grown | shrunk, 0)
        state.done[rows] |= rates[:, 1] < self.converged

    def _perturb(
        self, oracle: QueryOracle | torch.nn.Module, x: Tensor, y: Tensor, target: Tensor | None, index: Tensor | None
    ) -> Tensor:
        return self.threat.project(super()._perturb(oracle, x, y, target, index), x)  # the walk is outside the ball
