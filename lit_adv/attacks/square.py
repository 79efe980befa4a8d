"""Square Attack: random search over square-shaped changes on the surface of the ball."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.draws import Draws
from lit_adv.losses import Loss, cross_entropy, margin
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Iterations of 10,000 after which the share of changed pixels is halved."""


@dataclass(kw_only=True)
class SquareState(State):
    """Adds what is remembered of the search.

    Attributes:
        best: (n,) float64, the loss of the current image, never asked for again.
        lower, upper: in linf, the ball cut by the box.
    """

    best: Tensor
    lower: Tensor
    upper: Tensor


class Square(IterativeAttack):
    """Each step proposes one change of a random square, kept if it raises the loss; one query a step.

    linf: the start is x0 +- eps in vertical stripes; a step paints a square with one random sign per channel. l2: the
    start is a grid of bumps; a step moves the norm of two windows into a bump in the first of them.

    Departures: squares may touch the last row and column, as in the paper (the release leaves these out); each image
    has its own square (the release shares one in l2); where the drawn signs would change nothing, others are drawn, as
    in the release, here in one go; a bump that cancels the old content of its window to nothing is put there alone
    (the release divides by zero). A grid of bumps exists for images of any shape.

    Args:
        threat: norm (linf, l2), radius and box.
        steps: queries of a start, the first of them for the starting point; the schedule of sizes stretches over them.
        p_init: share of the pixels in the first squares, in (0, 1]. The paper: 0.05 (linf) and 0.1 (l2) for standard
            networks, 0.3 to 0.8 for robust ones.
        restarts: starts of an unbroken image.
        loss: what is raised. None: the paper's, the margin, or the cross-entropy of the target.
        stop_at_hit: False runs all steps.
        seed: of starts and squares.

    Raises:
        ValueError: an argument out of its range, a norm without a rule, or an l2 ball without a surface.
    References:
        Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049: algorithms 1 to 3, equation (2), section 3.3
        and supplement B (values of p and their schedule).
    """

    access = Access.PROBS
    needs_whole_step = False
    looks_first = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel(),  # noqa: B008 - frozen
        steps: int = 10000,
        p_init: float = 0.8,
        restarts: int = 1,
        loss: Loss | None = None,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm not in ("linf", "l2"):
            raise ValueError(f"Square has rules for linf and l2, got norm {threat.norm!r}: choose one of them")
        if threat.norm == "l2" and threat.radius == float("inf"):
            raise ValueError("eps must be finite in l2, got inf: the search runs on the surface of the ball")
        if steps < 1 or restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
        if not 0 < p_init <= 1:
            raise ValueError(f"p_init must be a share of the pixels in (0, 1], e.g. 0.05 or 0.8, got {p_init}")
        self.threat, self.steps, self.p_init, self.restarts = threat, steps, p_init, restarts
        self.loss, self.stop_at_hit, self.seed = loss, stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return 1

    def start(self, search: Search, rows: Tensor) -> SquareState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        lower = upper = x0.new_zeros(len(x0), 0)
        if self.threat.norm == "linf":
            low, high = self.threat.box
            lower, upper = (x0 - self.threat.radius).clamp_min_(low), (x0 + self.threat.radius).clamp_max_(high)
            fields["x"] = self._stripes(search.starting_draws(rows), lower, upper)
        else:
            fields["x"] = self._bumps(search.starting_draws(rows), x0)
        best = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=x0.device)
        return SquareState(**fields, best=best, lower=lower, upper=upper)

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, SquareState)
        propose = self._paint if self.threat.norm == "linf" else self._move
        proposal = propose(search.draws(state), state)
        first = (state.t == 0).nonzero().squeeze(1)
        if len(first):
            proposal[first] = state.x[first]
        scores = search.scores(proposal, state)
        loss = self.loss or (margin if state.target is None else cross_entropy)
        value = loss(scores, state.y, state.target, search.reject).double()
        better = value > state.best  # False for NaN
        state.best = torch.where(better, value, state.best)
        better = better.nonzero().squeeze(1)
        state.x.index_copy_(0, better, proposal[better])
        state.done = state.done | (state.t + 1 >= self.steps)  # the image left behind has been asked about
        return state

    def sides(self, t: Tensor, height: int, width: int) -> Tensor:
        """Side of the square that each row proposes as its query number ``t`` (from 0, the start): (n,) int64.

        The iteration, rescaled to 10,000, has passed a number of halvings of p; the square is the nearest to p of the
        pixels. In l2 it is odd and at least 3, where the image has room.
        """
        scaled = ((t - 1).clamp_min(0) * 10000).div(self.steps, rounding_mode="floor")
        halved = torch.bucketize(scaled, torch.tensor(HALVINGS, device=t.device))
        return torch.tensor(self._table(height, width), device=t.device)[halved]

    def _table(self, height: int, width: int) -> list[int]:
        wanted = [round((self.p_init / 2**halved * height * width) ** 0.5) for halved in range(len(HALVINGS) + 1)]
        room = min(height, width)
        if self.threat.norm == "linf":
            return [min(max(side, 1), room) for side in wanted]
        return [min(max(side, 3) // 2 * 2 + 1, room - (room + 1) % 2) for side in wanted]

    def _stripes(self, draws: Draws, lower: Tensor, upper: Tensor) -> Tensor:
        (n, channels), width = lower.shape[:2], lower.shape[3]
        up = draws.uniform(1, channels * width).view(n, channels, 1, width) < 0.5
        return torch.where(up, upper, lower)

    def _paint(self, draws: Draws, state: SquareState) -> Tensor:
        """The image with one square at x0 +- eps, a sign per channel."""
        channels, height, width = state.x.shape[1:]
        uniform = draws.uniform(1, 3 + channels)[:, 0]
        window = Window(uniform[:, :2], self.sides(state.t, height, width), height, width)
        lines, columns = window.lines.to(state.x)[:, None, :, None], window.columns.to(state.x)[:, None, None, :]
        signs = _signs(uniform[:, 3:])
        low, high = self.threat.box
        lines *= min(3 * self.threat.radius, 2 * (high - low))  # beyond the ball or the box from anywhere in them

        def painted(rows: Tensor | slice, signs: Tensor) -> Tensor:
            change = lines[rows] * signs.to(state.x)[:, :, None, None]
            proposal = torch.addcmul(state.x[rows], change, columns[rows])
            return torch.clamp(proposal, state.lower[rows], state.upper[rows], out=proposal)

        proposal = painted(slice(None), signs)
        idle = ((proposal - state.x).abs_().flatten(1).amax(1) == 0).nonzero().squeeze(1)
        if len(idle):
            proposal[idle] = painted(idle, _others(signs[idle], uniform[idle, 2]))
        return proposal

    def _bumps(self, draws: Draws, x0: Tensor) -> Tensor:
        """A grid of bumps, five to the shorter side, with a sign for each and each channel."""
        (n, channels), (height, width) = x0.shape[:2], x0.shape[2:]
        side = max(1, min(height, width) // 5)
        down, across = height // side, width // side
        uniform = draws.uniform(1, (channels + 1) * down * across).view(n, channels + 1, down, across)
        upright, turned = bump(side).to(x0), bump(side).T.to(x0)
        tile = torch.where((uniform[:, 0] < 0.5)[..., None, None], turned, upright)  # (n, down, across, side, side)
        tiles = _signs(uniform[:, 1:]).to(x0)[..., None, None] * tile.unsqueeze(1)
        delta = torch.zeros_like(x0)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        grid = tiles.permute(0, 1, 2, 4, 3, 5).reshape(n, channels, down * side, across * side)
        delta[:, :, top : top + down * side, left : left + across * side] = grid
        return self._on_surface(delta, x0)

    def _move(self, draws: Draws, state: SquareState) -> Tensor:
        """The image with the norm of two windows, and what is unused, in a bump added to the first (algorithm 3).

        What a channel keeps of its old change is a sum of three outer products, one for each window and one for what
        they share, so that no mask is made of pixels.
        """
        x0, (channels, height, width) = state.x0, state.x.shape[1:]
        uniform = draws.uniform(1, 5 + channels)[:, 0]
        side = self.sides(state.t, height, width)
        first, second = (Window(uniform[:, k : k + 2], side, height, width) for k in (0, 2))
        lines = torch.stack([first.lines, second.lines, first.lines & second.lines], 2).to(x0)  # (n, H, 3)
        columns = torch.stack([first.columns, second.columns, first.columns & second.columns], 2).to(x0)
        added = self._bump(first, uniform[:, 4] < 0.5, x0)
        delta = state.x - x0
        square = delta.square()
        within = ((square.flatten(1, 2) @ columns).view(*square.shape[:3], 3) * lines[:, None]).sum(2)  # (n, C, 3)
        unused = (self.threat.radius**2 - square.sum((1, 2, 3))).clamp_min_(0).div_(channels)
        room = (within[..., 0] + within[..., 1] - within[..., 2]).clamp_min_(0).add_(unused[:, None])
        length = within[..., 0].sqrt()
        shared = (delta * added[:, None]).sum((2, 3)) / length.clamp_min(1e-10)
        signs = _signs(uniform[:, 5:]).to(x0)
        size = (2 * signs * shared).add_(1).add_((length > 1e-10).to(x0)).clamp_min_(0).sqrt_()
        empty = (length <= 1e-10) | (size < 1e-3)
        factor = room.sqrt_() / torch.where(empty, 1, size)
        kept = torch.where(empty, 0, factor / length.clamp_min(1e-10))
        kept = torch.stack([kept - 1, -torch.ones_like(kept), torch.ones_like(kept)], 2)  # (n, C, 3)
        share = (lines[:, None] * kept[:, :, None]).flatten(1, 2) @ columns.mT  # (n, C H, W), less 1
        moved = torch.addcmul(delta, delta, share.view_as(delta))
        return self._on_surface(moved.addcmul_(added[:, None], (signs * factor)[:, :, None, None]), x0)

    def _bump(self, window: Window, turned: Tensor, like: Tensor) -> Tensor:
        """Each row's bump in its window, zero elsewhere: (n, H, W), of norm 1, in the precision of ``like``."""
        sides = tuple(sorted(set(self._table(window.lines.shape[1], window.columns.shape[1]))))
        table, pitch = bumps(sides).to(like), sides[-1] + 2
        number = torch.searchsorted(torch.tensor(sides, device=window.side.device), window.side)
        begin = (2 * number + turned.long()) * pitch**2
        down, across = (
            torch.minimum(place.clamp(-1), window.side[:, None]) + 1 for place in (window.down, window.across)
        )
        place = (begin[:, None] + down * pitch).int()[:, :, None] + across.int()[:, None, :]
        return table.view(-1).index_select(0, place.view(-1)).view(place.shape)

    def _on_surface(self, delta: Tensor, x0: Tensor) -> Tensor:
        length = delta.square().sum((1, 2, 3), keepdim=True).sqrt_().clamp_min_(1e-12)
        return torch.addcmul(x0, delta, self.threat.radius / length).clamp_(*self.threat.box)


class Window:
    """The square of each row, placed by two uniform numbers (n, 2).

    Attributes:
        side: (n,). down, across: (n, H) and (n, W), lines and columns counted from the square's corner.
        lines, columns: which of them are in the square, bool.
    """

    def __init__(self, uniform: Tensor, side: Tensor, height: int, width: int) -> None:
        self.side = side
        ways = torch.tensor([height + 1, width + 1], device=side.device) - side[:, None]
        corner = (uniform.double() * ways).long().minimum(ways - 1)
        self.down = torch.arange(height, device=side.device) - corner[:, :1]
        self.across = torch.arange(width, device=side.device) - corner[:, 1:]
        self.lines = (self.down >= 0) & (self.down < side[:, None])
        self.columns = (self.across >= 0) & (self.across < side[:, None])


@lru_cache(maxsize=32)
def bumps(sides: tuple[int, ...]) -> Tensor:
    """The bumps of some sides, upright and turned, each in the corner of a square with a margin of zeros.

    Returns: float64 of shape (k, 2, p, p), where p is 2 more than the largest side.
    """
    pitch = max(sides) + 2
    table = torch.zeros(len(sides), 2, pitch, pitch, dtype=torch.float64)
    for number, side in enumerate(sides):
        inside = slice(1, side + 1)
        table[number, 0, inside, inside], table[number, 1, inside, inside] = bump(side), bump(side).T
    return table


@lru_cache(maxsize=32)
def bump(side: int) -> Tensor:
    """Two opposite mounds, one over the other, of norm 1 together: float64 (side, side)."""
    half = side // 2
    both = torch.cat([_mound(half, side), -_mound(side - half, side)])
    return both / both.norm()


def _mound(height: int, width: int) -> Tensor:
    """A rectangle that falls off from its middle in steps (equation 2), of norm 1."""
    mound = torch.zeros(height, width, dtype=torch.float64)
    top, left = height // 2, width // 2
    for ring in range(max(top, left) + 1):
        down, across = slice(max(top - ring, 0), top + ring + 1), slice(max(left - ring, 0), left + ring + 1)
        mound[down, across] += 1 / (ring + 1) ** 2
    return mound / mound.norm() if mound.numel() else mound


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _others(signs: Tensor, uniform: Tensor) -> Tensor:
    """Signs drawn uniformly from all but those given: a random set of them, never empty, is flipped."""
    coins = min(signs.shape[1], 24)
    sets = 2**coins - 1
    chosen = (uniform.double() * sets).long().clamp_max(sets - 1) + 1
    flipped = (chosen[:, None] >> torch.arange(coins, device=chosen.device)) & 1
    return torch.cat([signs[:, :coins] * (1 - 2 * flipped), signs[:, coins:]], 1)
