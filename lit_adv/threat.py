"""What an attacker may do to an image: the norm, the radius and the box."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2", "l1", "l0"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")


@dataclass(frozen=True)
class ThreatModel:
    """A ball of radius ``eps`` around the clean image, cut by the box of valid pixels.

    Args:
        norm: ``linf``, ``l2``, ``l1`` or ``l0`` (the number of changed values).
        eps: the radius in pixel units of [0, 1]; a number, a fraction such as ``"8/255"``, or ``"inf"`` for no
            limit but the box. 0 is legal: the only image in the ball is the clean one.
        box: smallest and largest valid pixel value.
        levels: if given, e.g. 255, candidates are rounded to multiples of ``1 / levels`` inside the ball before
            they are asked about, so that what an attack returns survives an 8-bit file.

    Raises:
        ValueError: unknown norm, a negative or non-finite radius, an empty box, fewer than one level, levels that
            do not meet the ends of the box.
    """

    norm: Norm = "linf"
    eps: float | str = "8/255"
    box: tuple[float, float] = (0.0, 1.0)
    levels: int | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        low, high = self.box
        if not low < high:
            raise ValueError(f"box must be (low, high) with low < high, got {self.box}")
        if self.levels is not None and self.levels < 1:
            raise ValueError(f"levels must be at least 1 (255 for 8 bits) or None, got {self.levels}")
        if self.levels is not None and any(
            abs(end * self.levels - round(end * self.levels)) > 1e-6 for end in self.box
        ):
            raise ValueError(
                f"levels must divide the box, whose ends are multiples of 1 / {self.levels}, got {self.box}: leave "
                "levels out, or choose another box"
            )
        radius = _number(self.eps)
        if math.isnan(radius) or radius < 0:
            raise ValueError(f"eps must be a radius >= 0 in pixel units, e.g. 0.3 or '8/255', got {self.eps!r}")
        if self.norm == "linf" and high - low < radius < math.inf:
            warnings.warn(
                f"eps {self.eps!r} is more than the whole range of pixels, {high - low:g}: meant '{self.eps}/255'?",
                stacklevel=3,
            )
        object.__setattr__(self, "box", (float(low), float(high)))
        object.__setattr__(self, "_radius", radius)

    @property
    def radius(self) -> float:
        """``eps`` as a number; ``math.inf`` if only the box limits the attacker."""
        return self._radius  # type: ignore[attr-defined]

    def distance(self, x: Tensor, x0: Tensor) -> Tensor:
        """Distance of each image from its clean one.

        Shape: ``x`` and ``x0`` (n, C, H, W) -> (n,).
        """
        return norm_of((x - x0).flatten(1), self.norm)

    def in_box(self, x: Tensor) -> Tensor:
        """Whether each image is finite and in the box, up to 1e-6: (n,) bool."""
        low, high = self.box
        flat = x.flatten(1)
        return ((flat >= low - 1e-6) & (flat <= high + 1e-6)).all(1)  # False for NaN as well

    def within(self, x: Tensor, x0: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Whether each image is in box and ball, up to a relative 1e-6 and the rounding of its pixels: (n,) bool.

        Args:
            dtype: in which the pixels were rounded, where ``x`` has been cast since.
        """
        return self.in_box(x) & (self.distance(x, x0) <= self.reach(x, dtype))

    def reach(self, x: Tensor, dtype: torch.dtype | None = None) -> float:
        """The largest distance that :meth:`within` allows images of this size."""
        return self.radius * (1 + 1e-6) + self._rounding(dtype or x.dtype, x[0].numel() if len(x) else 1)

    def _rounding(self, dtype: torch.dtype, pixels: int) -> float:
        """How far rounding may carry a point of the ball's surface outside: half a unit per pixel, twice in linf."""
        unit = torch.finfo(dtype).eps * max(abs(self.box[0]), abs(self.box[1]))
        return {"linf": unit, "l2": unit * math.sqrt(pixels) / 2, "l1": unit * pixels / 2, "l0": 0.0}[self.norm]

    def project(self, x: Tensor, x0: Tensor) -> Tensor:
        """The images moved into ball and box; one already inside is returned unmoved.

        Exact projection onto the ball for every norm, followed by the box: since ``x0`` lies in the box, cutting
        to it only brings the image closer.

        Shape: ``x`` (n, [s,] C, H, W), ``x0`` (n, C, H, W) or already of the shape of ``x``.
        """
        x0 = x0 if x0.dim() == x.dim() else x0.unsqueeze(1)
        low, high = self.box
        if self.radius == math.inf:
            return x.clamp(low, high)
        if self.norm == "linf":
            lower, upper = (x0 - self.radius).clamp_min(low), (x0 + self.radius).clamp_max(high)
            return x.clamp(lower, upper)
        delta = x - x0
        length = norm_of(delta.flatten(-3), self.norm)[..., None, None, None]
        return torch.where(length > self.radius, self._shrink(delta, length).add_(x0), x).clamp(low, high)

    def _shrink(self, delta: Tensor, length: Tensor) -> Tensor:
        """The nearest perturbation in the ball, of one that is ``length`` long; may reuse its memory."""
        if self.norm == "l2":
            share = self.radius / length.clamp_min(torch.finfo(delta.dtype).tiny)
            return delta * share if delta.requires_grad else delta.mul_(share)
        flat = delta.flatten(-3)
        if self.norm == "l1":
            flat = _onto_l1(flat, self.radius)
        else:
            flat = _keep_largest(flat, int(self.radius))
        return flat.view_as(delta)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Unit step of steepest ascent in this norm; zero where the gradient is zero (or not finite).

        linf: the sign. l2: the direction. l1 and l0: the one coordinate of the largest magnitude.

        Shape: (n, C, H, W) -> (n, C, H, W).
        """
        if self.norm == "linf":
            return gradient.sign()  # the sign of NaN is 0 in torch
        flat = gradient.flatten(1)
        largest = flat.abs().amax(1, keepdim=True)
        if not bool(largest.isfinite().all()):
            flat = torch.where(flat.isfinite(), flat, 0.0)
            largest = flat.abs().amax(1, keepdim=True)
        if self.norm == "l2":
            flat = flat / torch.where(largest > 0, largest, 1.0)  # so that tiny gradients do not underflow
            length = flat.norm(dim=1, keepdim=True)
            return (flat / torch.where(length > 0, length, 1.0)).view_as(gradient)
        place = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, place, flat.gather(1, place).sign()).view_as(gradient)

    def quantize(self, x: Tensor, x0: Tensor, levels: int = 255) -> Tensor:
        """The images rounded to multiples of ``1 / levels``, towards ``x0`` where the nearest leaves the ball.

        Where even that leaves the ball (a clean image that is not itself on the grid, and a radius of less than
        half a level) the clean image's own nearest level stands. An image that lies outside the ball to begin with,
        on the way of a search for the nearest one, is rounded and left there.

        Shape: as :meth:`project`.
        """
        x0 = x0 if x0.dim() == x.dim() else x0.unsqueeze(1)
        nearest = (x * levels).round() / levels
        if self.radius == math.inf:
            return nearest
        inward = torch.where(x >= x0, (x * levels + 1e-4).floor(), (x * levels - 1e-4).ceil()) / levels
        clean = ((x0 * levels).round() / levels).expand_as(x)
        inside = ~self._beyond(x - x0, whole=True)
        for step in (inward, clean):
            nearest = torch.where(self._beyond(nearest - x0) & inside, step, nearest)
        return nearest

    def _beyond(self, delta: Tensor, whole: bool = False) -> Tensor:
        """Where a perturbation leaves the ball: in linf pixel by pixel, unless asked for the ``whole``."""
        limit = self.reach(delta.flatten(0, -4) if delta.dim() > 4 else delta)
        if self.norm == "linf" and not whole:
            return delta.abs() > limit
        return (norm_of(delta.flatten(-3), self.norm) > limit)[..., None, None, None]


def _number(eps: float | str) -> float:
    try:
        return float(eps) if not isinstance(eps, str) or "/" not in eps else float(Fraction(eps))
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f"eps must be a number, a fraction like '8/255', or 'inf', got {eps!r}") from None


def norm_of(delta: Tensor, norm: Norm) -> Tensor:
    """The norm over the last dimension; NaN counts as infinitely far, never as near."""
    if norm == "linf":
        value = delta.abs().amax(-1)
    elif norm == "l2":
        value = delta.norm(dim=-1)
    elif norm == "l1":
        value = delta.abs().sum(-1)
    else:
        value = (delta != 0).sum(-1).to(delta.dtype)
    return value.nan_to_num(nan=math.inf, posinf=math.inf)


def _onto_l1(flat: Tensor, radius: float) -> Tensor:
    """Euclidean projection onto the l1 ball by soft thresholding (Duchi et al. 2008, figure 1)."""
    magnitude = flat.abs().sort(-1, descending=True).values
    excess = magnitude.cumsum(-1) - radius
    count = torch.arange(1, flat.shape[-1] + 1, device=flat.device, dtype=flat.dtype)
    last = (magnitude * count > excess).to(flat.dtype).mul(count).argmax(-1, keepdim=True)
    threshold = (excess.gather(-1, last) / (last + 1)).clamp_min(0)
    return flat.sign() * (flat.abs() - threshold).clamp_min(0)


def _keep_largest(flat: Tensor, count: int) -> Tensor:
    kept = flat.abs().topk(min(count, flat.shape[-1]), dim=-1).indices
    return torch.zeros_like(flat).scatter(-1, kept, flat.gather(-1, kept))
