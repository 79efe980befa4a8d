"""Bandits: a guess of the gradient that is carried from step to step and corrected by two values each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.estimator import ProbeEstimator

_FARTHEST = 8.0  # artanh of what float32 can just tell from 1


@dataclass(frozen=True)
class Bandits(ProbeEstimator):
    """Keeps a prior v of the gradient on coarse tiles and returns it, upsampled, after one correction.

    With ``e = exploration u / sqrt(D)``, u Gaussian on the D tiles, both ``U(v + e)`` and ``U(v - e)`` are tried as
    steps of length ``probe_length`` (l2); the difference of the two values, over ``probe_length exploration``, times
    e is the gradient of the prior's own loss, along which the prior is moved: added (l2), or by exponentiated
    gradient, which keeps it in [-1, 1] (linf). That the prior is kept over the steps is the time prior, that it lives
    on tiles (nearest neighbour U) the data prior. Two queries per step, and one for the point itself, a check.

    Departures from the authors' code: what exponentiated gradient remembers is artanh(v), to which its step is a
    plain addition, cut to +-8; the same prior in exact arithmetic, but it neither sticks at +-1 nor overflows. An
    image ends at its first adversarial point, there it goes on being moved. ``tile`` is at most the image's side.

    Args:
        tile: side of the prior, in tiles; None or more than the image's: a value per pixel (Bandits-T).
        exploration: delta, length of the change that is tried on the prior, > 0.
        probe_length: eta, length in l2 of the step at whose end values are read, pixel units.
        prior_step_size: of the prior's own ascent, > 0.
        update: ``exponentiated`` (for linf) or ``additive`` (for l2).

    Raises:
        ValueError: an argument out of its range.
    References:
        Ilyas et al. 2019, https://arxiv.org/abs/1807.07978, algorithms 1 to 3, section 3; the defaults are those of
        their linf attack on ImageNet. Its l2 attack: exploration 0.01, probe_length 0.01, prior_step_size 0.1.
    """

    tile: int | None = 50
    exploration: float = 1.0
    probe_length: float = 0.1
    prior_step_size: float = 100.0
    update: Literal["exponentiated", "additive"] = "exponentiated"

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile must be at least 1 per side, or None for one per pixel, got {self.tile}")
        for name in ("exploration", "probe_length", "prior_step_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}")
        if self.update not in ("exponentiated", "additive"):
            raise ValueError(f"update must be exponentiated (linf) or additive (l2), got {self.update!r}")

    def probes(self, shape: torch.Size) -> int:
        return 2

    def init(self, x: Tensor) -> Tensor:
        tile = max(x.shape[2:]) if self.tile is None else self.tile
        return x.new_zeros(len(x), x.shape[1], min(tile, x.shape[2]), min(tile, x.shape[3]))

    def empty(self, x: Tensor) -> Tensor:
        return self.init(x)

    def ask(self, x: Tensor, memory: Tensor, draws: Draws, first: Tensor, out: Tensor) -> Tensor:
        tiles = memory.shape[1:]
        change = draws.normal(*tiles, dtype=x.dtype).mul_(self.exploration / math.sqrt(tiles.numel()))
        prior = self._prior(memory)
        tried = torch.stack([prior + change, prior - change], 1)
        length = (tried**2 * _pixels(tried, x)).flatten(2).sum(2).sqrt_().clamp_min_(1e-8)
        tried.mul_((self.probe_length / length)[:, :, None, None, None])
        wide, times = _widened(tried, x)
        n, channels, _, width = x.shape
        rows = (channels, wide.shape[-2], times, width)
        torch.add(x.reshape(n, 1, *rows), wide.unsqueeze(-2), out=out.view(n, 2, *rows))
        return change

    def gather(self, told: Tensor, probes: Tensor, values: Tensor, x: Tensor, value: Tensor) -> Tensor:
        rise = (values[:, 0] - values[:, 1]).nan_to_num(0.0, 0.0, 0.0)
        return told * (rise / (self.probe_length * self.exploration)).to(told.dtype)[:, None, None, None]

    def finish(self, total: Tensor, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = memory.add(total, alpha=self.prior_step_size)
        if self.update == "exponentiated":
            memory = memory.clamp_(-_FARTHEST, _FARTHEST)
        return upsampled(self._prior(memory), x), memory

    def _prior(self, memory: Tensor) -> Tensor:
        return memory if self.update == "additive" else memory.tanh()


def upsampled(prior: Tensor, x: Tensor) -> Tensor:
    """Nearest neighbours, (n, ..., h, w) -> (n, ..., H, W): row ``i h // H`` and column ``j w // W``."""
    wide, times = _widened(prior, x)
    return wide if times == 1 else wide.unsqueeze(-2).expand(*wide.shape[:-1], times, -1).flatten(-3, -2)


def _widened(prior: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """All columns, but of rows only those that differ, and how often each of them stands in the image.

    A product with zeros and ones and then whole rows: several times as fast as ``F.interpolate`` on small images.
    """
    (tiles, width), (height, across) = prior.shape[-2:], x.shape[-2:]
    if width != across:
        chosen = F.one_hot(_nearest(width, across, x), width).to(prior.dtype).T
        with torch.autocast(x.device.type, enabled=False):
            prior = prior @ chosen
    if height % tiles:
        return prior.index_select(-2, _nearest(tiles, height, x)), 1
    return prior, height // tiles


def _nearest(tiles: int, pixels: int, x: Tensor) -> Tensor:
    return torch.arange(pixels, device=x.device) * tiles // pixels


def _pixels(prior: Tensor, x: Tensor) -> Tensor:
    """Pixels of each tile, (h, w)."""
    rows, columns = (
        _nearest(prior.shape[side], x.shape[side], x).bincount(minlength=prior.shape[side]) for side in (-2, -1)
    )
    return torch.outer(rows, columns).to(prior.dtype)
