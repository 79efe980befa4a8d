"""What a search in coordinates moves: pixels or their arctanh, at the image's size or on a coarser grid that grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Space = Literal["pixel", "tanh"]
_EDGE = 0.9999995  # the paper's: black and white pixels have a finite arctanh


@dataclass(frozen=True)
class Variables:
    """The map from perturbations w on a grid to images, one coordinate at a time.

    An image is ``f(u0 + A w B')``: bilinear interpolation with half-pixel centres, a product of two matrices, from
    the grid to the image, and f the identity (cut to the box) or ``low + (high - low) (1 + tanh) / 2``. A grid that
    grows is stored at its final size, filled from the upper left; each row has its level.

    Attributes:
        space: ``pixel`` or ``tanh``. box: of valid pixels.
        sizes: (h, w) of each level, none larger than the image.
        upper: (levels, H, h of the last) interpolation matrices of the rows of pixels, zero beyond a level's own size.
        across: (levels, W, w of the last) of the columns.
        same: the only grid is the image itself.
    """

    space: Space
    box: tuple[float, float]
    sizes: tuple[tuple[int, int], ...]
    upper: Tensor
    across: Tensor
    same: bool

    @classmethod
    def of(cls, space: Space, box: tuple[float, float], sides: tuple[int, ...], x0: Tensor) -> Variables:
        """The variables of images like ``x0`` (n, C, H, W); ``sides`` are the grid's at each level, () for no grid."""
        height, width = x0.shape[-2:]
        sizes = tuple((min(side, height), min(side, width)) for side in sides) or ((height, width),)
        same = all(size == (height, width) for size in sizes)
        upper = _matrices([size[0] for size in sizes], height, x0)
        return cls(space, box, sizes, upper, _matrices([size[1] for size in sizes], width, x0), same)

    @property
    def grid(self) -> tuple[int, int]:
        """The final (h, w)."""
        return self.sizes[-1]

    def origin(self, x0: Tensor) -> Tensor:
        """The point of the clean image, shape as ``x0``."""
        if self.space == "pixel":
            return x0
        low, high = self.box
        return ((2 * (x0 - low) / (high - low) - 1) * _EDGE).atanh()

    def values(self, u: Tensor) -> Tensor:
        """Pixels of points, of any shape; those of a grid in pixel space are cut to the box."""
        low, high = self.box
        if self.space == "tanh":
            return u.tanh().add_(1).mul_((high - low) / 2).add_(low)
        return u if self.same else u.clamp(low, high)

    def images(self, w: Tensor, u0: Tensor, level: Tensor) -> Tensor:
        """Images of perturbations w (n, C, h, w) at their levels (n,): (n, C, H, W), in the box."""
        return self.values(self._points(w, u0, level)).clamp(*self.box)

    def probes(self, x: Tensor, w: Tensor, u0: Tensor, level: Tensor, place: Tensor, h: float) -> Tensor:
        """Images with one coordinate moved up and down: (n, 2 s, C, H, W), pairs side by side.

        Args:
            x: (n, C, H, W) the images in between. place: (n, s) the coordinates, in the flattened grid.
            h: how far. In pixel space, as in the authors' code, the image may leave the box by as much.
        """
        n, samples = place.shape
        images = x.unsqueeze(1).expand(n, 2 * samples, *x.shape[1:]).clone()
        if self.same:
            clean, steps = u0.flatten(1).gather(1, place), x.new_tensor([h, -h])
            moved = self.values((clean + w.flatten(1).gather(1, place)).unsqueeze(2) + steps)
            at = place[:, :, None, None].expand(n, samples, 2, 1)
            images.view(n, samples, 2, -1).scatter_(3, at, moved.unsqueeze(3))
            return images
        rows, numbers = torch.arange(n, device=x.device)[:, None], torch.arange(samples, device=x.device)
        channel, down, right = self._split(place)
        plane = self._points(w, u0, level)[rows, channel]
        bump = self.upper.mT[level[:, None], down].mul(h).unsqueeze(-1) * self.across.mT[
            level[:, None], right
        ].unsqueeze(-2)
        for sign in (0, 1):
            images[rows, 2 * numbers + sign, channel] = self.values(plane - bump if sign else plane + bump)
        return images

    def distance_slopes(self, w: Tensor, u0: Tensor, level: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of the squared distance by the coordinates ``place``, (n, s) each.

        In closed form, for the difference of two nearly equal distances would be round-off. Measured from the image
        at w = 0, which is the clean one up to 3e-7 in tanh space, so that both vanish exactly where nothing moved.
        """
        if self.same:
            start = u0.flatten(1).gather(1, place)
            return self._square(start + w.flatten(1).gather(1, place), start)
        first, second = self._square(self._points(w, u0, level), u0)
        upper, across = self.upper[level].unsqueeze(1), self.across[level].unsqueeze(1)
        first, second = _product(upper.mT, first, across), _product(upper.mT**2, second, across**2)
        return first.flatten(1).gather(1, place), second.flatten(1).gather(1, place)

    def enlarged(self, w: Tensor, level: int) -> Tensor:
        """Perturbations of a level interpolated to the next one's size, in the same storage."""
        (h, wide), size = self.sizes[level], self.sizes[level + 1]
        grown = F.interpolate(w[..., :h, :wide], size, mode="bilinear", align_corners=False)
        return F.pad(grown, (0, w.shape[-1] - size[1], 0, w.shape[-2] - size[0]))

    def importance(self, w: Tensor, level: int, size: tuple[int, int]) -> Tensor:
        """Weights (n, C, h, w) of the coordinates of a grid of ``size``: the largest change in the tile around each.

        There are eight by eight tiles, as in the authors' code. A row in which nothing has moved gets equal weights.
        """
        high, wide = self.sizes[level]
        tile = max(1, high // 8), max(1, wide // 8)
        change = F.max_pool2d(w[..., :high, :wide].abs(), tile, ceil_mode=True)
        weight = F.interpolate(change, size, mode="nearest")
        largest = weight.amax((1, 2, 3), keepdim=True)
        weight = torch.where(largest > 0, weight / largest, 1.0).clamp_min(1e-12)
        return F.pad(weight, (0, w.shape[-1] - size[1], 0, w.shape[-2] - size[0]))

    def _points(self, w: Tensor, u0: Tensor, level: Tensor) -> Tensor:
        if self.same:
            return u0 + w
        return u0 + _product(self.upper[level].unsqueeze(1), w, self.across[level].mT.unsqueeze(1))

    def _square(self, u: Tensor, u0: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative of ``(f(u) - f(u0))**2`` by u, element by element."""
        low, high = self.box
        if self.space == "pixel":
            inside = 1.0 if self.same else ((u > low) & (u < high)).to(u.dtype)
            return 2 * (self.values(u) - u0) * inside, 2 * inside * torch.ones_like(u)
        tanh, half = u.tanh(), (high - low) / 2
        change = half * (tanh - u0.tanh())
        slope = half * (1 - tanh**2)
        return 2 * change * slope, 2 * (slope**2 - 2 * change * tanh * slope)

    def _split(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channel, row and column of coordinates of the flattened grid."""
        height, width = self.grid
        inside = place % (height * width)
        return place // (height * width), inside // width, inside % width


def _matrices(sides: list[int], out: int, like: Tensor) -> Tensor:
    """Linear interpolation from each side to ``out``, (levels, out, largest side), padded with zeros."""
    matrices = []
    for side in sides:
        unit = torch.eye(side, dtype=like.dtype, device=like.device).unsqueeze(1)
        grown = F.interpolate(unit, out, mode="linear", align_corners=False).squeeze(1)
        matrices.append(F.pad(grown.T, (0, max(sides) - side)))
    return torch.stack(matrices)


def _product(left: Tensor, w: Tensor, right: Tensor) -> Tensor:
    with torch.autocast(w.device.type, enabled=False):
        return left @ w @ right
