"""Suspect pixels and their suppression: what a rectifier takes out of an image before it is classified again."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_adv.draws import Draws, fresh_draws
from lit_adv.inputs import wide

MaskMode = Literal["threshold", "quantile", "rate"]
MODES: tuple[MaskMode, ...] = get_args(MaskMode)
_LEVELS = 255  # replaced pixels are values of an 8-bit image


def suspects(sensitivity: Tensor, alpha: float, mode: MaskMode = "threshold", joint: bool = False) -> Tensor:
    """Which pixels of each image to suspect, equation (12): those to which the detector is most sensitive.

    A pixel is one where the sensitivity g exceeds ``alpha (g_max - g_min) + g_min``, strictly, with the extremes of its
    own image and channel; so an even sensitivity (a constant image) leaves nothing to suspect, nor does one that is not
    finite everywhere. The paper calls ``alpha`` the rate of masking, but by its equation, the default here, a larger
    ``alpha`` suspects fewer pixels; the other modes turn this round.

    Args:
        sensitivity: absolute value of the detector's gradient; a sign is ignored.
        alpha: in [0, 1].
        mode: ``threshold``: equation (12) as printed; none at 1, all but the least at 0. ``rate``: the same with
            ``1 - alpha``. ``quantile``: the share ``alpha`` of largest sensitivity, as in table 1; what ties with the
            first one left out is left out too.
        joint: one mask for all channels, of the largest sensitivity among them, where the paper (of grey images) says
            nothing; False: each channel by itself.

    Shape:
        (n, C, H, W) -> (n, C, H, W) bool

    Raises:
        ValueError: ``alpha`` outside [0, 1], an unknown mode, or no such tensor.

    References:
        Li, Wang & Wu 2020, "Are L2 adversarial examples intrinsically different?", section 3.2.
    """
    check_share("alpha", alpha)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if sensitivity.dim() != 4 or not sensitivity.is_floating_point():
        raise ValueError(f"sensitivity must be floats (n, C, H, W), got {_shown(sensitivity)}")
    size = sensitivity.detach().abs()
    flat = (size.amax(1, keepdim=True) if joint else size).flatten(2)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    if mode == "quantile":
        mask = (flat > _first_left_out(flat, alpha)) & (low < high) & high.isfinite()
    else:  # so written, rounding puts no pixel above the limit at 1
        mask = flat - low > (alpha if mode == "threshold" else 1 - alpha) * (high - low)
    return mask.view(*mask.shape[:2], *size.shape[-2:]).expand_as(size).contiguous()


def suppressed(x: Tensor, mask: Tensor, share: float = 0.5, draws: Draws | None = None) -> Tensor:
    """The images with some of their suspect pixels replaced by random ones, equation (13).

    Each suspect keeps its value or, with probability ``share``, takes one drawn from the normal distribution with the
    mean and standard deviation of its image's channel, cut to [0, 1] and rounded to a multiple of 1/255. (The paper
    prints N(sigma, mu) for the mean and standard deviation.) What is not replaced stays the same to the last bit, and
    only there a gradient passes.

    Args:
        x: images in [0, 1].
        mask: the suspects.
        share: probability u of a suspect to be replaced, in [0, 1]; the paper does not say.
        draws: one row per image; None: torch's generator.

    Shape:
        x and mask (n, C, H, W) -> (n, C, H, W)

    Raises:
        ValueError: ``share`` outside [0, 1], or a mask of another shape or type.

    References:
        Li, Wang & Wu 2020, section 3.2.
    """
    check_share("share", share)
    if x.dim() != 4 or mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool in the shape of images (n, C, H, W), {_shown(x)}, got {_shown(mask)}")
    if not x.numel():
        return x
    with torch.no_grad():
        draws = fresh_draws(x) if draws is None else draws
        replaced = mask & (draws.uniform(*x.shape[1:]) < share)
        pixels = wide(x)
        normal = draws.normal(*x.shape[1:], dtype=pixels.dtype)
        std, mean = torch.std_mean(pixels, dim=(2, 3), correction=0, keepdim=True)
        level = normal.mul_(std).add_(mean).clamp_(0, 1).mul_(_LEVELS).round_().div_(_LEVELS)
    return torch.where(replaced, level.to(x.dtype), x)


def check_share(name: str, value: float) -> None:
    """Refuse what is no number in [0, 1].

    Raises:
        ValueError: naming argument and value.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _first_left_out(flat: Tensor, alpha: float) -> Tensor:
    """The largest value that does not belong to the share ``alpha`` of largest ones: (n, C, P) -> (n, C, 1)."""
    pixels = flat.shape[-1]
    kept = round(alpha * pixels)
    if kept == pixels:
        return flat.new_full((*flat.shape[:-1], 1), -1.0)
    return flat.kthvalue(pixels - kept, dim=-1, keepdim=True).values


def _shown(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
