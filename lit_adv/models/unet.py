"""A small encoder-decoder with skips, from images to images."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.models.layers import check_positive
from lit_adv.models.normalize import ImageInput

_LEAST = 4


class UNet(nn.Module):
    """Encoder of stride-2 convolutions, decoder of bilinear up-sampling, skips between equal sizes.

    The last layer is a 1x1 convolution without bounds, for answers of either sign. The normalisation within is by
    groups of one image's channels: batch norm would let the images of a batch see one another and would answer
    otherwise in training than after it, which a regression of a few hundred images does not forgive.

    Args:
        in_channels: of the images.
        out_channels: of the answer; None: as many.
        widths: channels of the levels, from the image's size downwards.
        out_size: height and width of the answer, to which the image is resized first; None: those of the image.
        normalize: group normalisation after every 3x3 convolution.
        mean: per channel in [0, 1]; None for no normalisation of the image.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, H, W) in [0, 1], sides of at least 4, to (n, out_channels, H or out_size, W or out_size).

    Raises:
        ValueError: if a size is not positive; when called, if an image is too small or has other channels.

    References:
        Ronneberger, Fischer and Brox, 2015, https://arxiv.org/abs/1505.04597.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int | None = None,
        widths: Sequence[int] = (32, 64, 128),
        out_size: int | None = None,
        normalize: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        answers = in_channels if out_channels is None else out_channels
        size = _LEAST if out_size is None else out_size
        check_positive(in_channels=in_channels, out_channels=answers, widths=list(widths), out_size=size)
        if size < _LEAST:
            raise ValueError(f"out_size must be at least {_LEAST}, got {size}")
        self.out_size = out_size
        self.image_input = ImageInput(in_channels, mean=mean, std=std)
        self.down = nn.ModuleList()
        before = in_channels
        for level, width in enumerate(widths):
            self.down.append(nn.Sequential(
                _convolution(before, width, normalize, stride=1 if level == 0 else 2),
                _convolution(width, width, normalize),
            ))  # fmt: skip
            before = width
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(_convolution(below + beside, beside, normalize) for below, beside in pairs)
        self.last = nn.Conv2d(widths[0], answers, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.image_input(x)
        if min(x.shape[2:]) < _LEAST:
            raise ValueError(f"images must have sides of at least {_LEAST} pixels, got {tuple(x.shape)}")
        if self.out_size is not None and x.shape[2:] != (self.out_size, self.out_size):
            sides = (self.out_size, self.out_size)
            x = F.interpolate(x, sides, mode="bilinear", align_corners=False, antialias=True)
        levels = []
        for stage in self.down:
            x = stage(x)
            levels.append(x)
        for stage, beside in zip(self.up, reversed(levels[:-1]), strict=True):
            x = F.interpolate(x, beside.shape[2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat([x, beside], 1))
        return self.last(x)


def _convolution(inputs: int, width: int, normalize: bool, stride: int = 1) -> nn.Sequential:
    # at least four channels a group: alone, a channel of one pixel would be normalised to 0
    layers: list[nn.Module] = [nn.Conv2d(inputs, width, 3, stride, padding=1)]
    if normalize:
        layers.append(nn.GroupNorm(math.gcd(8, max(1, width // 4)) if width % 8 == 0 else 1, width))
    return nn.Sequential(*layers, nn.ReLU())
