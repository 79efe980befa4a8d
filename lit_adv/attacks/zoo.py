"""ZOO: the attack of Carlini and Wagner with derivatives from values, a few coordinates at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.blocks import Blocks
from lit_adv.losses import hinge, is_adversarial
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel
from lit_adv.variables import Space, Variables

Solver = Literal["adam", "newton", "adam_newton"]
_BETAS = (0.9, 0.999)
_NOTHING = 1e-7  # slopes below are round-off, which Adam would turn into whole steps
_NO_UPPER = 1e10


@dataclass(kw_only=True)
class ZOOState(State):
    """Adds the perturbation with its moments, the search for the constant, and the probes of this iteration.

    Attributes:
        w: (n, C, h, w) perturbation on the grid. origin: (n, C, H, W) the clean image in the space searched.
        m, v, tau: (n, D) Adam's moments and each coordinate's own step counter, D = C h w.
        weight: (n, D) importance of the coordinates, 0 outside the row's level; (n, 0) where all weigh the same.
        level: (n,) of the grid.
        c, lower, upper: (n,) float64, the constant and what is known of it. round: (n,) constants behind it.
        k: (n,) iterations with this constant. found: (n,) it has made the image adversarial. clear: (n,) its hinge
            has been 0. previous: (n,) float64, the objective at the last test for progress.
        value: (n,) float64 hinge at the image. place: (n, B) coordinates of this iteration. rise and bend: (n, B or
            more) first and (but for Adam) second difference of the hinge there. phase: (n,) blocks asked.
        variables: the map from perturbations to images. blocks: of an iteration's probes.
    """

    w: Tensor
    origin: Tensor
    m: Tensor
    v: Tensor
    tau: Tensor
    weight: Tensor
    level: Tensor
    c: Tensor
    lower: Tensor
    upper: Tensor
    round: Tensor
    k: Tensor
    found: Tensor
    clear: Tensor
    previous: Tensor
    value: Tensor
    place: Tensor
    rise: Tensor
    bend: Tensor
    phase: Tensor
    variables: Variables
    blocks: Blocks


class ZOO(IterativeAttack):
    """Black-box search for the nearest adversarial image, in l2, by coordinate descent.

    Minimises ``|x' - x|^2 + c max(0, log p_y - max log p_other)``, targeted likewise. An iteration asks for the image
    and for two probes of each of B coordinates drawn without replacement, 2 B + 1 queries; Adam (with a step counter
    for each coordinate) or Newton's method moves those coordinates. The constant c is searched as by Carlini and
    Wagner: times 10 until it succeeds, then bisected; each begins at the clean image. Of the images themselves (the
    probes are no candidates) the nearest adversarial one is kept; with a finite radius and ``stop_at_hit`` a row ends
    at the first within it. Whatever the threat model's norm, which only measures, the method minimises l2.

    Departures from the authors' code: the difference of the squared distance is taken in closed form, and slopes
    below 1e-7 count as 0, so that no round-off is followed (a thermometer code is therefore never left);
    coordinates whose answers were NaN stay; the hinge is that of the scores, without 1e-30 inside the logarithm;
    an image already adversarial ends at once; there is no limit of 20 on the distance; the image after the last
    update is asked too, as a check. A budget that does not cover a whole iteration is left.

    Args:
        threat: norm in which the distance is measured, radius and box; ``eps: inf`` for the nearest image.
        steps: iterations of a row in all, in equal shares (rounded up) for the constants.
        search_steps: constants tried; 1 leaves it as given.
        coordinates: B, of an iteration; at most as many as there are.
        step_size: of Adam and Newton, in units of the space.
        h: half the distance of the two probes of a coordinate, > 0; 1e-6 or less drowns in float32.
        space: ``tanh``, or ``pixel`` with a projection onto the box (MNIST: black and white pixels have no slope in
            tanh space).
        solver: ``adam``; ``newton``; ``adam_newton``: Newton where the curvature is not negative.
        constant: the first c, > 0.
        early_stop: iterations between tests for progress; a constant is given up where the objective has not fallen
            by 0.01 %. 0: a tenth of its iterations. None: never.
        reset_adam: forget the moments when the hinge first reaches 0.
        sides: of the grid on which the perturbation lives, interpolated bilinearly to the image, e.g. 32, 64, 128;
            none: the image's own.
        resize_at: iterations of a constant at which the grid takes its next side. Adam then begins anew, and the
            coordinates are drawn by importance: in proportion to the largest change in one of 8 x 8 tiles.
        refresh: renew the importance in every iteration after the first resizing, as the paper means it; the
            authors' code does so at a resizing only.
        block: most probes per image in one forward, at least 2.
        stop_at_hit: False keeps on to the end even where the radius is finite.
        seed: of the coordinates.

    Raises:
        ValueError: an argument out of its range.
    References:
        Chen et al. 2017, https://arxiv.org/abs/1708.03999: equations (4) to (7), algorithms 1 to 3, sections 3.4 to
        3.6. Its settings: 9 constants from 0.01; MNIST 3000 iterations each in pixel space, CIFAR-10 1000 in tanh
        space (the defaults), ImageNet 1500 of step size 0.002 on grids.
    """

    minimizes_distance = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("l2", "inf"),  # noqa: B008 - frozen
        steps: int = 9000,
        search_steps: int = 9,
        coordinates: int = 128,
        step_size: float = 0.01,
        h: float = 1e-4,
        space: Space = "tanh",
        solver: Solver = "adam",
        constant: float = 0.01,
        early_stop: int | None = 100,
        reset_adam: bool = False,
        sides: Sequence[int] = (),
        resize_at: Sequence[int] = (),
        refresh: bool = False,
        block: int = 32,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        _check(threat, steps, search_steps, coordinates, early_stop, block)
        _check_choices(step_size, h, constant, space, solver)
        _check_sides(sides, resize_at)
        self.threat, self.steps, self.search_steps, self.coordinates = threat, steps, search_steps, coordinates
        self.step_size, self.h, self.space, self.solver = step_size, h, space, solver
        self.constant, self.early_stop, self.reset_adam = constant, early_stop, reset_adam
        self.sides, self.resize_at, self.refresh = tuple(sides), tuple(resize_at), refresh
        self.block, self.stop_at_hit, self.seed = block, stop_at_hit, seed
        self.access = Access.PROBS
        self._each = -(-steps // search_steps)  # iterations of one constant
        self._test_every = early_stop if early_stop else max(1, self._each // 10)

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self._blocks(shape).size

    def least(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        whole = self._blocks(shape).total + 1
        return torch.where(state.phase == 0, whole, 1) if isinstance(state, ZOOState) else whole

    def _blocks(self, shape: torch.Size) -> Blocks:
        """How the probes of an iteration are asked, the two of a coordinate side by side."""
        channels, height, width = shape
        smallest = self.sides[0] if self.sides else max(height, width)
        count = min(self.coordinates, channels * min(smallest, height) * min(smallest, width))
        return Blocks(2 * count, self.block, even=True)

    def start(self, search: Search, rows: Tensor) -> ZOOState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        variables = Variables.of(self.space, self.threat.box, self.sides, x0)
        w = x0.new_zeros(len(rows), x0.shape[1], *variables.grid)
        size = w[0].numel() if len(w) else w.shape[1] * variables.grid[0] * variables.grid[1]
        blocks = self._blocks(x0.shape[1:])
        places = blocks.count * blocks.size // 2
        exact = torch.zeros(len(rows), dtype=torch.float64, device=x0.device)
        number, no = torch.zeros_like(rows), torch.zeros_like(fields["done"])
        state = ZOOState(
            **fields, w=w, origin=variables.origin(x0),
            m=x0.new_zeros(len(rows), size), v=x0.new_zeros(len(rows), size), tau=x0.new_zeros(len(rows), size),
            weight=x0.new_zeros(len(rows), size if self.resize_at else 0), level=number.clone(),
            c=exact + self.constant, lower=exact.clone(), upper=exact + _NO_UPPER, round=number.clone(),
            k=number.clone(), found=no.clone(), clear=no.clone(), previous=exact + 1e6, value=exact.clone(),
            place=number.new_zeros(len(rows), blocks.total // 2), rise=x0.new_zeros(len(rows), places),
            bend=x0.new_zeros(len(rows), 0 if self.solver == "adam" else places), phase=number.clone(),
            variables=variables, blocks=blocks,
        )  # fmt: skip
        self._begin_constant(state, torch.arange(len(rows), device=rows.device))
        return state

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, ZOOState)
        fresh = (state.phase == 0).nonzero().squeeze(1)
        if len(fresh):
            self._begin(search, state, fresh)
        going = ~(state.done | search.won(state))
        number = int(going.sum())
        state.inside = torch.ones_like(going)
        if not number:
            return state
        self._probe(search, state, going[:, None] if number < len(state) else None)
        state.phase = state.phase + 1
        complete = (state.phase == state.blocks.count) & going
        state.inside = ~complete
        at = complete.nonzero().squeeze(1)
        if len(at):
            self._update(search, state, at)
        return state

    def _begin(self, search: Search, state: ZOOState, at: Tensor) -> None:
        """Ask about the images of rows that begin an iteration, and draw their coordinates."""
        part = state if len(at) == len(state) else state[at]
        scores = search.scores(part.x, part)
        state.value[at] = -hinge(scores.double(), part.y, part.target, search.reject)
        found = is_adversarial(scores.argmax(-1), part.y, part.target, search.reject) & ~scores.isnan().any(-1)
        state.found[at] |= found
        if search.watch:  # nothing is nearer than the clean image, and in a radius of 0 nothing else is
            hopeless = self.threat.radius == 0
            state.done = state.done.index_put((at,), (found & (part.t == 0)) | hopeless)
        chance = search.draws(part).uniform(part.tau.shape[1])
        if part.weight.shape[1]:  # the smallest of exponential times: a draw without replacement by weight
            chance = chance.log_().neg_().div_(part.weight.float()).neg_()
        state.place[at] = chance.topk(state.place.shape[1], dim=1).indices

    def _probe(self, search: Search, state: ZOOState, going: Tensor | None) -> None:
        """Ask about the next block of probes of each row (that is going on) and note the differences of the hinge."""
        blocks, asked = state.blocks, None
        probes = blocks.numbers(state.phase)
        if blocks.total < blocks.count * blocks.size or going is not None:
            asked = (probes < blocks.total) if going is None else (probes < blocks.total) & going
        number = probes[:, ::2] // 2
        place = state.place.gather(1, number.clamp_max(state.place.shape[1] - 1))
        images = state.variables.probes(state.x, state.w, state.origin, state.level, place, self.h)
        scores = search.scores(images, state, candidate=False, asked=asked)
        gain = hinge(scores, state.y, state.target, search.reject).view(*number.shape, 2)
        state.rise.scatter_(1, number, (gain[..., 1] - gain[..., 0]).to(state.rise.dtype))
        if self.solver != "adam":
            bend = gain.double().sum(-1).neg_().sub_(2 * state.value[:, None])
            state.bend.scatter_(1, number, bend.to(state.bend.dtype))

    def _update(self, search: Search, state: ZOOState, at: Tensor) -> None:
        """Move the coordinates of rows whose probes are complete, and see to their constants and grids."""
        place, c, level = state.place[at], state.c[at, None], state.level[at]
        count = place.shape[1]
        slope, bend = state.variables.distance_slopes(state.w[at], state.origin[at], level, place)
        slope = slope + c * state.rise[at, :count] / (2 * self.h)
        if self.solver != "adam":
            bend = bend + c * state.bend[at, :count] / self.h**2
        nothing = slope.abs() < _NOTHING
        search.count("zero gradient estimates", nothing)
        self._move(state, at, place, slope.masked_fill(nothing, 0), bend)
        cleared = (state.value[at] == 0) & ~state.clear[at]
        state.clear[at] |= cleared
        if self.reset_adam:
            _forget(state, at[cleared])
        stalled = self._stalled(state, at)
        state.k[at] += 1
        over = stalled | (state.k[at] >= self._each)
        self._resize(state, at[~over])
        state.x = state.x.index_put((at,), state.variables.images(state.w[at], state.origin[at], state.level[at]))
        state.phase = state.phase.index_fill(0, at, 0)
        if over.any():
            self._next_constant(search, state, at[over])

    def _move(self, state: ZOOState, at: Tensor, place: Tensor, slope: Tensor, bend: Tensor) -> None:
        """One step of the solver on the coordinates ``place``; unknown slopes leave theirs alone."""
        cells = (at[:, None], place)
        known = slope.isfinite()
        g = torch.where(known, slope, 0).to(state.w.dtype)
        m, v = state.m[cells].mul_(_BETAS[0]).add_((1 - _BETAS[0]) * g), state.v[cells].mul_(_BETAS[1])
        v.add_((1 - _BETAS[1]) * g**2)
        tau = state.tau[cells] + 1
        rate = (1 - _BETAS[1] ** tau).sqrt() / (1 - _BETAS[0] ** tau)
        move = self.step_size * rate * m / (v.sqrt() + 1e-8)
        if self.solver != "adam":
            curvature = torch.where(bend < 0, 1.0, bend).clamp_min(0.1).nan_to_num(1.0).to(g.dtype)
            newton = self.step_size * g / curvature
            move = newton if self.solver == "newton" else torch.where(bend >= 0, newton, move)
        w = state.w.view(len(state), -1)
        moved = w[cells] - move
        if self.space == "pixel" and state.variables.same:
            clean, (low, high) = state.origin.view(len(state), -1)[cells], self.threat.box
            moved = moved.clamp(low - clean, high - clean)
        for field, new in ((state.m, m), (state.v, v), (state.tau, tau), (w, moved)):
            field[cells] = torch.where(known, new, field[cells])

    def _stalled(self, state: ZOOState, at: Tensor) -> Tensor:
        """Rows whose objective has not fallen since the last test for progress."""
        due = state.k[at] % self._test_every == 0
        if self.early_stop is None or not due.any():
            return torch.zeros_like(due)
        far = (state.x[at] - state.x0[at]).flatten(1).double().pow(2).sum(1)
        objective = far + state.c[at] * state.value[at]
        stalled = due & (objective > 0.9999 * state.previous[at])
        state.previous[at] = torch.where(due, objective, state.previous[at])
        return stalled

    def _resize(self, state: ZOOState, at: Tensor) -> None:
        """Interpolate perturbations that are due to the next grid, and renew the importance of coordinates."""
        for level, iteration in enumerate(self.resize_at):
            k, now = state.k[at], state.level[at]
            due = at[(k == iteration) & (now == level)]
            if len(due):
                weight = state.variables.importance(state.w[due], level, state.variables.sizes[level + 1])
                state.weight[due] = weight.flatten(1)
                state.w[due] = state.variables.enlarged(state.w[due], level)
                state.level[due] = level + 1
                _forget(state, due)
            again = at[(k != iteration) & (now == level + 1)] if self.refresh else at[:0]
            if len(again):
                size = state.variables.sizes[level + 1]
                state.weight[again] = state.variables.importance(state.w[again], level + 1, size).flatten(1)

    def _next_constant(self, search: Search, state: ZOOState, at: Tensor) -> None:
        found, c = state.found[at], state.c[at]
        lower = torch.where(found, state.lower[at], torch.maximum(state.lower[at], c))
        upper = torch.where(found, torch.minimum(state.upper[at], c), state.upper[at])
        state.lower[at], state.upper[at] = lower, upper
        state.c[at] = torch.where(upper < _NO_UPPER / 10, (lower + upper) / 2, 10 * c)
        state.round[at] += 1
        last = state.round[at] >= self.search_steps
        if search.watch:  # early: where all steps are taken the row ends by itself, its last image asked once more
            state.done = state.done.index_put((at,), last & (state.t[at] + 1 < self.steps))
        self._begin_constant(state, at[~last])

    def _begin_constant(self, state: ZOOState, at: Tensor) -> None:
        """Back to the clean image and the smallest grid."""
        state.w[at] = 0
        _forget(state, at)
        for number in (state.k, state.level):
            number[at] = 0
        for flag in (state.found, state.clear):
            flag[at] = False
        state.previous[at] = 1e6
        if self.resize_at:
            (height, width), first = state.variables.sizes[0], torch.zeros_like(state.w[:1])
            first[..., :height, :width] = 1
            state.weight[at] = first.flatten(1)
        images = state.variables.images(state.w[at], state.origin[at], state.level[at])
        state.x = state.x.index_put((at,), images)

    def perturb(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        return self.threat.project(super().perturb(oracle, x, y, target, index), x)


def _forget(state: ZOOState, at: Tensor) -> None:
    for moment in (state.m, state.v, state.tau):
        moment[at] = 0


def _check(
    threat: ThreatModel, steps: int, search_steps: int, coordinates: int, early_stop: int | None, block: int
) -> None:
    check_threat(threat)
    if not steps >= search_steps >= 1:
        raise ValueError(f"search_steps must be at least 1 and steps no fewer, got {search_steps} and {steps} steps")
    if coordinates < 1:
        raise ValueError(f"coordinates must be at least 1 per iteration, got {coordinates}")
    if block < 2:
        raise ValueError(f"block must be at least 2, the two probes of a coordinate, got {block}")
    if early_stop is not None and early_stop < 0:
        raise ValueError(f"early_stop must be >= 0 iterations, or None for never, got {early_stop}")


def _check_choices(step_size: float, h: float, constant: float, space: str, solver: str) -> None:
    for name, value in (("step_size", step_size), ("h", h), ("constant", constant)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value}")
    if space not in ("pixel", "tanh"):
        raise ValueError(f"space must be pixel or tanh, got {space!r}")
    if solver not in ("adam", "newton", "adam_newton"):
        raise ValueError(f"solver must be adam, newton or adam_newton, got {solver!r}")


def _check_sides(sides: Sequence[int], resize_at: Sequence[int]) -> None:
    if len(resize_at) != max(0, len(sides) - 1):
        raise ValueError(
            f"resize_at must name an iteration for each side after the first, got {list(sides)} and {list(resize_at)}"
        )
    if sorted(sides) != list(sides) or any(side < 1 for side in sides):
        raise ValueError(f"sides must be at least 1 and ascend, e.g. [32, 64, 128], got {list(sides)}")
    if any(a >= b for a, b in zip([0, *resize_at], resize_at, strict=False)):
        raise ValueError(f"resize_at must ascend from at least 1, e.g. [2000, 10000], got {list(resize_at)}")
