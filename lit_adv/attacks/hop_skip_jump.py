"""HopSkipJump: walks along the decision boundary towards the image, told nothing but labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.draws import Draws
from lit_adv.oracle import Access, QueryOracle
from lit_adv.parts import part_of, places_of, rows_of, wide, won_by
from lit_adv.threat import ThreatModel

Starts = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x0 (n, C, H, W), y (n,), target (n,) or None) -> (n, C, H, W)``: images to begin at, row by row."""

TRY, BLEND, REACH, ESTIMATE, STEP, RETURN = range(6)  # what a row is about to ask
_PROBES, _TRIES = 0, 1  # keys of the random numbers
_BLENDED = 1e-3  # share of the noise to which the first blend is bisected
_FORWARDS = 8  # most images of a pass, in forwards: each operation around them takes its time however few they are


@dataclass(kw_only=True)
class HopSkipJumpState(State):
    """Adds what a row is at, and what it knows; ``x`` is adversarial from the first hit on.

    Attributes:
        phase: (n,) one of the six. number: (n,) images asked in it.
        size: (n,) images asked about in the next pass.
        low: (n,) float64 lower end of a bisection. high: the upper end, adversarial. theta: their gap at its end.
        span: (n,) float64 distance at which the latest bisection began.
        length: (n,) float64 distance of ``x`` while estimating, then length of the step.
        told: (n, 2, C, H, W) sum of probe directions, and of directions times decisions; then the update first.
        votes: (n, 2) answers known, and sum of decisions.
    """

    phase: Tensor
    number: Tensor
    size: Tensor
    low: Tensor
    high: Tensor
    theta: Tensor
    span: Tensor
    length: Tensor
    told: Tensor
    votes: Tensor


class HopSkipJump(IterativeAttack):
    """Estimates the normal of the decision boundary from labels around a point on it, steps along, and bisects back.

    A row begins at uniform noise that is adversarial, blended with the image by bisection. Each step asks
    ``samples * sqrt(step)`` probes in blocks, halves the step until it is adversarial, and bisects to the boundary. A
    pass asks one thing of each row, whatever it is at. The nearest adversarial image is kept.

    Departures from the authors' code: adversarial means other than the true label, not other than the prediction;
    in l2 the bisection after the first blend goes on where that ended (the same point, up to 10 queries fewer); the
    halvings end after ``search_steps``, and the row then estimates anew where it stands; an answer of NaN is left out
    of the estimate; after 16 tries for a beginning the next eighth of their number is asked at once. Probes are
    offered as adversarial images only where they may lie within a finite radius.

    Args:
        threat: norm (linf, l2), radius and box; ``"inf"``: the nearest image whatever its distance.
        steps: most steps.
        samples: probes of the first step's estimate; step j asks ``samples * sqrt(j)``.
        max_samples: most probes of one estimate.
        gamma: bisections end at gamma / d^1.5 (l2) or gamma / d^2 (linf) of the distance, for d values in an image;
            probes lie gamma / d of the distance away (in the first step: a tenth of the box).
        init_tries: most images of uniform noise asked in search of a beginning; where none is adversarial the image
            has failed.
        search_steps: most lengths tried in one step.
        starts: gives images to begin at, e.g. of the target's class; one that is not adversarial is followed by noise.
        block: most probes per image in one forward.
        stop_at_hit: False runs all steps and keeps the nearest, also within a finite radius.
        seed: of noise and probes.

    Raises:
        ValueError: an argument out of its range, or a norm without a rule.
    References:
        Chen, Jordan & Wainwright 2020, https://arxiv.org/abs/1904.02144, algorithms 1 and 2, equations (9), (12),
        (14) to (16); 40 steps as in the authors' code (their theta is above; the paper's own is d^-1 times as large).
    """

    access = Access.LABEL
    looks_first = True
    minimizes_distance = True
    needs_whole_step = False

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("l2", "inf"),  # noqa: B008 - frozen
        steps: int = 40,
        samples: int = 100,
        max_samples: int = 10000,
        gamma: float = 1.0,
        init_tries: int = 10000,
        search_steps: int = 25,
        starts: Starts | None = None,
        block: int = 32,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm not in ("linf", "l2"):
            raise ValueError(f"HopSkipJump has rules for linf and l2, got norm {threat.norm!r}: choose one of them")
        counts = {"steps": steps, "samples": samples, "max_samples": max_samples, "init_tries": init_tries}
        for name, value in {**counts, "search_steps": search_steps, "block": block}.items():
            if value < 1 or value != int(value):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be a finite number > 0 (the authors': 1), got {gamma}")
        self.threat, self.steps, self.samples, self.max_samples = threat, steps, samples, max_samples
        self.gamma, self.init_tries, self.search_steps = gamma, init_tries, search_steps
        self.starts, self.block, self.stop_at_hit, self.seed = starts, block, stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        return state.size if isinstance(state, HopSkipJumpState) else 1

    def start(self, search: Search, rows: Tensor) -> HopSkipJumpState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        number = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        # rows are written to in place: nothing may be shared between fields
        fields |= {"x": x0.clone(), "inside": fields["inside"].clone()}
        fields["done"] = torch.full_like(fields["done"], self.threat.radius == 0)
        return HopSkipJumpState(
            **fields,
            phase=torch.full_like(rows, TRY),
            number=torch.zeros_like(rows),
            size=torch.ones_like(rows),
            low=number,
            high=number.clone(),
            theta=number.clone(),
            span=number.clone(),
            length=number.clone(),
            told=x0.new_zeros(len(x0), 2, *x0.shape[1:]),
            votes=x0.new_zeros(len(x0), 2),
        )

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, HopSkipJumpState)
        state.inside = ~state.done
        probing = state.phase == ESTIMATE
        several = (state.size > 1) & ~probing
        single = places_of(~(probing | several | state.done))
        if len(single):
            self._ask_one(search, state, single)
        rows = places_of(several)
        if len(rows):
            self._ask_tries(search, state, rows)
        rows = self._turn(search, state, places_of(probing), len(single))
        if len(rows):
            near = self._near(state, rows)
            for offered, group in [(False, rows)] if near is None else [(False, rows[~near]), (True, rows[near])]:
                if len(group):
                    self._ask_probes(search, state, group, offered)
        state.size = self._sizes(state)
        return state

    def _sizes(self, state: HopSkipJumpState) -> Tensor:
        """Images that each row asks about in its next pass: (n,)."""
        total = self._samples(state.t + ~state.inside)
        blocks = (total + self.block - 1) // self.block
        probes = torch.minimum((total + blocks - 1) // blocks, total - state.number)
        size = torch.where(state.phase == ESTIMATE, probes, 1)
        trying = places_of((state.phase == TRY) & (state.number >= 16))
        if len(trying):
            number = state.number[trying]
            size[trying] = (number // 8).clamp_max(self.block).minimum(self.init_tries - number).clamp_min(1)
        return size

    def _samples(self, t: Tensor) -> Tensor:
        """Probes of the estimate in each row's step."""
        return (self.samples * (t + 1).double().sqrt()).long().clamp_max(self.max_samples)

    def _turn(self, search: Search, state: HopSkipJumpState, rows: Tensor, singles: int) -> Tensor:
        """Those of the rows with probes to ask that take their turn; the others wait, for memory's sake."""
        most = _FORWARDS * search.oracle.chunk - singles
        if not search.watch or len(rows) * self.block <= most:
            return rows
        return rows[: max(1, int((state.size[rows].cumsum(0) <= most).sum()))]

    def _near(self, state: HopSkipJumpState, rows: Tensor) -> Tensor | None:
        """Which rows have probes that may lie within the radius; None where none has."""
        if not math.isfinite(self.threat.radius):
            return None
        near = rows_of(state.length, rows) - self._delta(state, rows) <= self.threat.radius
        return near if bool(near.any()) else None

    def _delta(self, state: HopSkipJumpState, rows: Tensor) -> Tensor:
        """Distance of the probes, (n,) float64: sqrt(d) theta (l2) or d theta (linf) times the distance."""
        low, high = self.threat.box
        later = rows_of(state.span, rows) * (self.gamma / state.x[0].numel())
        return torch.where(rows_of(state.t, rows) == 0, 0.1 * (high - low), later)

    def _ask_one(self, search: Search, state: HopSkipJumpState, rows: Tensor) -> None:
        """Ask the one image of every row that is trying, bisecting or stepping."""
        phase, x, part = rows_of(state.phase, rows), rows_of(state.x, rows), part_of(state, rows)
        trying, stepping = places_of(phase == TRY), places_of(phase == STEP)
        others = len(trying) + len(stepping) > 0
        bisecting = places_of((phase != TRY) & (phase != STEP)) if others else rows
        middle = (rows_of(state.low, rows) + rows_of(state.high, rows)) / 2
        images = self._between(x, part.x0, middle, phase)
        if len(trying):
            images[trying] = self._tries(search, state, rows[trying], 1).squeeze(1)
        if len(stepping):
            update = state.told[rows[stepping], 0].mul_(wide(state.length[rows[stepping]], x))
            images[stepping] = update.add_(x[stepping]).clamp_(*self.threat.box)
        label = search.label(images, part)
        won = won_by(label, part, search)
        if len(trying):
            self._tried(state, rows[trying], images[trying].unsqueeze(1), won[trying].unsqueeze(1))
        if len(stepping):
            self._stepped(state, rows[stepping], images[stepping], won[stepping])
        if others:
            rows, won, middle = rows[bisecting], won[bisecting], middle[bisecting]
        if len(rows):
            self._halved(state, rows, middle, won)

    def _ask_tries(self, search: Search, state: HopSkipJumpState, rows: Tensor) -> None:
        """Several tries at once, for rows that have had many in vain."""
        size = state.size[rows]
        images = self._tries(search, state, rows, int(size.max()))
        part, asked = part_of(state, rows), torch.arange(images.shape[1], device=rows.device) < size[:, None]
        self._tried(state, rows, images, won_by(search.label(images, part, asked=asked), part, search))

    def _tries(self, search: Search, state: HopSkipJumpState, rows: Tensor, width: int) -> Tensor:
        """The next images in search of a beginning, (n, width, C, H, W)."""
        x = state.x[rows]
        low, high = self.threat.box
        draws = search.draws(part_of(state, rows), key=_TRIES)
        images = draws.uniform(width, *x.shape[1:], first=state.number[rows], low=low, high=high, dtype=x.dtype)
        first = places_of(state.number[rows] == 0)
        if self.starts is not None and len(first):
            target = None if state.target is None else state.target[rows[first]]
            given = self.starts(x[first], state.y[rows[first]], target)
            if given.shape != x[first].shape:
                wanted = tuple(x[first].shape)
                raise ValueError(f"starts must give one image for each, shape {wanted}, got {tuple(given.shape)}")
            images[first, 0] = given.to(x).clamp(low, high)
        return images

    def _tried(self, state: HopSkipJumpState, rows: Tensor, images: Tensor, won: Tensor) -> None:
        """Begin to blend where a try was adversarial; give up after the last."""
        given = (state.number[rows] == 0) & (self.starts is not None)
        state.number[rows] += state.size[rows]
        found = won.any(1)
        begun = rows[found]
        state.done[rows] = ~found & (state.number[rows] >= self.init_tries)
        if not len(begun):
            return
        state.x[begun] = images[found, won[found].int().argmax(1)]
        state.phase[begun] = torch.where(given[found], REACH, BLEND)
        self._bisect(state, begun)

    def _bisect(self, state: HopSkipJumpState, rows: Tensor, low: Tensor | float = 0.0) -> None:
        """Set out from ``x`` towards the image; linf: by clipping to a radius, else along the straight line."""
        size, phase = state.x[0].numel(), state.phase[rows]
        span = self.threat.distance(state.x[rows], state.x0[rows]).double()
        if self.threat.norm == "l2":
            high, theta = torch.ones_like(span), torch.full_like(span, self.gamma / size**1.5)
        else:
            high, theta = torch.where(phase == BLEND, 1.0, span), self.gamma / size**2 * span.clamp_max(1.0)
        state.span[rows], state.low[rows], state.high[rows] = span, low, high
        state.theta[rows] = torch.where(phase == BLEND, _BLENDED, theta)

    def _between(self, x: Tensor, x0: Tensor, share: Tensor, phase: Tensor) -> Tensor:
        share = wide(share, x)
        if self.threat.norm == "l2":
            return torch.lerp(x0, x, share)
        clipped = torch.clamp(x, x0 - share, x0 + share)
        blend = places_of(phase == BLEND)
        if len(blend):
            clipped[blend] = torch.lerp(x0[blend], x[blend], share[blend])
        return clipped

    def _halved(self, state: HopSkipJumpState, rows: Tensor, middle: Tensor, won: Tensor) -> None:
        """Keep the half between an image that is not adversarial and one that is; go on where it is small."""
        low, high = (
            torch.where(won, rows_of(state.low, rows), middle),
            torch.where(won, middle, rows_of(state.high, rows)),
        )
        state.low[rows], state.high[rows] = low, high
        reached = rows[high - low <= rows_of(state.theta, rows)]
        if len(reached):
            self._reached(state, reached)

    def _reached(self, state: HopSkipJumpState, rows: Tensor) -> None:
        """Stand on the adversarial side of the boundary; after the blend it is still to be approached."""
        phase, low, high = state.phase[rows], state.low[rows], state.high[rows]
        state.x[rows] = self._between(state.x[rows], state.x0[rows], high, phase)
        state.inside[rows[phase == RETURN]] = False
        blended = phase == BLEND
        first = rows[blended]
        if len(first):
            state.phase[first] = REACH
            self._bisect(state, first, (low / high)[blended] if self.threat.norm == "l2" else 0.0)
            close = state.high[first] - state.low[first] <= state.theta[first]
            rows = torch.cat([rows[~blended], first[close]])
        self._probe(state, rows)

    def _probe(self, state: HopSkipJumpState, rows: Tensor) -> None:
        """Begin an estimate at ``x``."""
        state.phase[rows], state.number[rows] = ESTIMATE, 0
        state.length[rows] = self.threat.distance(state.x[rows], state.x0[rows]).double()
        state.told[rows], state.votes[rows] = 0.0, 0.0

    def _ask_probes(self, search: Search, state: HopSkipJumpState, rows: Tensor, offered: bool) -> None:
        """A block of decisions around the boundary point, added to what the blocks before it told."""
        part, size, number = part_of(state, rows), rows_of(state.size, rows), rows_of(state.number, rows)
        x = rows_of(state.x, rows).unsqueeze(1)
        width = int(size.max())
        probes = self._directions(search.draws(part, key=_PROBES), width, number, part.x0)
        length = probes.flatten(2).norm(dim=2).clamp_min_(1e-30)
        scale = (self._delta(state, rows)[:, None] / length).to(x.dtype)
        torch.addcmul(x, probes, scale[..., None, None, None], out=probes)
        probes.clamp_(*self.threat.box)
        asked = None
        if int(size.sum()) < width * len(rows):
            asked = torch.arange(width, device=rows.device) < size[:, None]
        label = search.label(probes, part, candidate=offered, asked=asked)
        known = (label >= 0).to(x.dtype)
        decision = won_by(label, part, search).to(x.dtype).mul_(2).sub_(known)  # 1, -1, and 0 where not known
        probes.sub_(x)  # what was added indeed, box and rounding included
        weights = torch.stack([known, decision], 1)
        with torch.autocast(x.device.type, enabled=False):
            told = weights @ probes.flatten(2)
        state.told[rows] += told.view(len(rows), 2, *part.x0.shape[1:])
        state.votes[rows] += weights.sum(2)
        number = number + size
        state.number[rows] = number
        complete = rows[number >= self._samples(part.t)]
        if len(complete):
            self._estimated(search, state, complete)

    def _directions(self, draws: Draws, width: int, first: Tensor, x: Tensor) -> Tensor:
        if self.threat.norm == "l2":
            return draws.normal(width, *x.shape[1:], first=first, dtype=x.dtype)
        return draws.uniform(width, *x.shape[1:], first=first, low=-1.0, dtype=x.dtype)

    def _estimated(self, search: Search, state: HopSkipJumpState, rows: Tensor) -> None:
        """Turn the sums into an update: the decisions' mean is subtracted, unless all agree."""
        known, decisions = state.votes[rows].unbind(1)
        mean = torch.where(decisions.abs() < known, decisions / known.clamp_min(1), 0.0)
        directions, weighted = state.told[rows].unbind(1)
        normal = weighted - wide(mean, weighted) * directions
        state.told[rows, 0] = self.threat.steepest(normal)
        state.length[rows] /= (state.t[rows] + 1).double().sqrt()
        state.phase[rows], state.number[rows] = STEP, 0
        flat = ~normal.flatten(1).any(1)
        search.count("boundary normals were exactly 0", flat)
        self._stay(state, rows[flat])

    def _stepped(self, state: HopSkipJumpState, rows: Tensor, images: Tensor, won: Tensor) -> None:
        """Bisect back from an adversarial image, else halve the step."""
        moved, short = rows[won], rows[~won]
        state.x[moved] = images[won]
        state.phase[moved] = RETURN
        self._bisect(state, moved)
        state.length[short] /= 2
        state.number[short] += 1
        self._stay(state, short[state.number[short] >= self.search_steps])

    def _stay(self, state: HopSkipJumpState, rows: Tensor) -> None:
        """End the step where it began."""
        if len(rows):
            state.inside[rows] = False
            self._probe(state, rows)

    def _perturb(
        self, oracle: QueryOracle | torch.nn.Module, x: Tensor, y: Tensor, target: Tensor | None, index: Tensor | None
    ) -> Tensor:
        return self.threat.project(super()._perturb(oracle, x, y, target, index), x)  # the walk leaves the ball
