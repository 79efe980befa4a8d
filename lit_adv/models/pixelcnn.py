"""PixelCNN: the probability of an image, value by value in raster order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.defense import straight_through
from lit_adv.inputs import wide
from lit_adv.models.layers import check_positive
from lit_adv.models.mixtures import bin_log_probabilities, log_probability
from lit_adv.models.normalize import ImageInput

Choose = Callable[[Tensor, Tensor], Tensor]
"""From log-probabilities (n, levels) of one value, and what it is now (n,), to what it shall be (n,)."""


class PixelDensity(nn.Module, ABC):
    """A distribution over images of ``levels`` values, as a product of each value's conditional given those before it.

    The order is by rows, in a row by columns, in a pixel by channels (red, green, blue). Images in [0, 1] are rounded
    to the nearest ``k / (levels - 1)``; for an attacker the rounding is straight-through.

    Args:
        in_channels: of the images.
        levels: values a channel can take, at least 2; 256 for 8-bit images.
    """

    def __init__(self, in_channels: int = 1, levels: int = 256) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, levels=levels)
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.in_channels, self.levels = in_channels, levels
        self.image_input = ImageInput(in_channels)

    @abstractmethod
    def log_conditionals(self, x: Tensor) -> Tensor:
        """Log-probability of every level for every value, given the values before it.

        Shape: (n, C, H, W) to (n, C, H, W, levels).
        """

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of images in nats, (n, C, H, W) to (n,)."""

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`log_prob`."""
        return self.log_prob(x)

    def quantised(self, x: Tensor) -> Tensor:
        """The levels of images' values, int64 of their shape."""
        self.image_input(x)
        return (x.detach().clamp(0, 1) * (self.levels - 1)).round().long()

    def image(self, level: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The images in [0, 1] of given levels."""
        return level.to(dtype) / (self.levels - 1)

    @torch.no_grad()
    def revise(self, x: Tensor, choose: Choose) -> Tensor:
        """Go through images in order and choose each value anew, given those chosen before it.

        Args:
            x: images; rounded.
            choose: asked once for each value, for all images together.

        Shape: (n, C, H, W) to the same, every value of the form k / (levels - 1).
        """
        level = self.quantised(x)
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                for channel in range(x.shape[1]):
                    place = (slice(None), channel, row, column)
                    told = self.log_conditionals(self.image(level, x.dtype))[place]
                    level[place] = choose(told, level[place])
        return self.image(level, x.dtype)

    def _centred(self, x: Tensor) -> Tensor:
        """The rounded images in [-1, 1], with the gradient of the images."""
        return 2 * straight_through(self.image(self.quantised(x), x.dtype), x) - 1


class PixelCNN(PixelDensity):
    """Gated PixelCNN: a vertical stack over the rows above, a horizontal one over the pixels to the left.

    Together they see all that comes before, without the blind spot of a single masked stack. Each layer's convolution
    is followed by tanh times sigmoid; features of a pixel are split into one group per colour, and a group sees in its
    own pixel only colours before its own. Two masked 1x1 convolutions follow the last layer.

    Args:
        in_channels: of the images.
        filters: features of each stack, divisible by ``in_channels``.
        layers: gated masked convolutions.
        kernel: their side in pixels, odd. first_kernel: that of the first.
        levels: values a channel can take.
        output: ``softmax``: one number per level. ``logistics``: each value has a mixture of ten logistic
            distributions, integrated over each level's interval; the outermost levels take the tails.

    Shape:
        (n, in_channels, H, W) in [0, 1] to log-probabilities (n,) in nats.

    Raises:
        ValueError: an argument out of its range.

    References:
        van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders",
        https://arxiv.org/abs/1606.05328, figure 2. Logistics: Salimans et al. 2017, https://arxiv.org/abs/1701.05517,
        equation (2); here a colour's dependence on the others of its pixel is the network's alone.
    """

    def __init__(
        self,
        in_channels: int = 1,
        filters: int = 32,
        layers: int = 5,
        kernel: int = 5,
        first_kernel: int = 7,
        levels: int = 256,
        output: Literal["softmax", "logistics"] = "softmax",
    ) -> None:
        super().__init__(in_channels, levels)
        check_positive(filters=filters, layers=layers)
        if filters % in_channels:
            raise ValueError(f"filters must be divisible by the {in_channels} colours of a pixel, got {filters}")
        for name, side in (("kernel", kernel), ("first_kernel", first_kernel)):
            if side < 3 or side % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 3, got {side}")
        if output not in ("softmax", "logistics"):
            raise ValueError(f"output must be 'softmax' or 'logistics', got {output!r}")
        self.output = output
        colours, own = torch.arange(in_channels), torch.arange(filters) * in_channels // filters
        first = _Layer(colours, own, first_kernel, first=True)
        self.layers = nn.ModuleList([first, *(_Layer(own, own, kernel) for _ in range(layers - 1))])
        answers = colours.repeat_interleave(levels if output == "softmax" else 30)
        self.head = nn.Sequential(
            nn.ReLU(), _Masked(own, own, (1, 1)), nn.ReLU(), _Masked(own, answers, (1, 1))
        )  # fmt: skip

    def log_prob(self, x: Tensor) -> Tensor:
        level = self.quantised(x).permute(0, 2, 3, 1)
        answer = self._answers(self._centred(x))
        if self.output == "softmax":
            each = -F.cross_entropy(answer.flatten(0, 3), level.flatten(), reduction="none").view_as(level)
        else:
            # the value itself has a gradient too, not the features alone
            each = log_probability(answer, self._centred(x).permute(0, 2, 3, 1), self.levels)
        # nats of a thousand values: in float32 the sum's own rounding would show
        return each.flatten(1).sum(1, dtype=torch.float64).to(each.dtype)

    def log_conditionals(self, x: Tensor) -> Tensor:
        return self._logs(self._answers(self._centred(x))).permute(0, 3, 1, 2, 4)

    @torch.no_grad()
    def revise(self, x: Tensor, choose: Choose) -> Tensor:
        """As of the base class, but each feature is computed once: the cost is that of one pass over the image."""
        level = self.quantised(x)
        value = 2 * self.image(level, x.dtype) - 1
        layers = [layer for layer in self.layers if isinstance(layer, _Layer)]
        width = x.shape[3]
        # the rows above that each layer sees, and what lies beyond the image
        above = [x.new_zeros(len(x), layer.inputs, layer.reach, width) for layer in layers]
        for row in range(x.shape[2]):
            links = []
            now = value[:, :, row : row + 1]
            for place, layer in enumerate(layers):
                window = above[place] if layer.first else torch.cat([above[place], now], 2)
                down = layer.down(F.pad(window, (layer.reach, layer.reach, 0, 0)))
                if not layer.first:
                    above[place] = window[:, :, 1:]
                links.append(layer.link(down))
                now = _gate(down)
            self._revise_row(level, value, row, links, choose)
            above[0] = torch.cat([above[0], value[:, :, row : row + 1]], 2)[:, :, 1:]
        return self.image(level, x.dtype)

    def _revise_row(self, level: Tensor, value: Tensor, row: int, links: list[Tensor], choose: Choose) -> None:
        """Choose the values of one row; ``links`` is what the rows above tell each layer."""
        layers = [layer for layer in self.layers if isinstance(layer, _Layer)]
        seen = [F.pad(link.new_zeros(len(link), layer.inputs, 1, link.shape[3]), (layer.reach, 0))
                for layer, link in zip(layers, links, strict=True)]  # fmt: skip
        seen[0][..., layers[0].reach :] = value[:, :, row : row + 1]
        for column in range(value.shape[3]):
            for channel in range(value.shape[1]):
                for place, (layer, link) in enumerate(zip(layers, links, strict=True)):
                    window = seen[place][..., column : column + layer.reach + 1]
                    h = layer.across(window, link[..., column : column + 1])
                    if place + 1 < len(layers):
                        seen[place + 1][..., layers[place + 1].reach + column] = h[..., 0]
                told = self._logs(self._split(self.head(h)))[:, 0, 0, channel]
                chosen = choose(told, level[:, channel, row, column])
                level[:, channel, row, column] = chosen
                value[:, channel, row, column] = 2 * self.image(chosen, value.dtype) - 1
                seen[0][:, channel, 0, layers[0].reach + column] = value[:, channel, row, column]

    def _answers(self, centred: Tensor) -> Tensor:
        """What the network says of each value, (n, H, W, C, numbers), in float32 at least."""
        v = h = centred
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            down = layer.down(F.pad(v[:, :, :-1] if layer.first else v, (layer.reach, layer.reach, layer.reach, 0)))
            h = layer.across(F.pad(h, (layer.reach, 0)), layer.link(down))
            v = _gate(down)
        return self._split(self.head(h))

    def _split(self, answer: Tensor) -> Tensor:
        return wide(torch.unflatten(answer.permute(0, 2, 3, 1), 3, (self.in_channels, -1)))

    def _logs(self, answer: Tensor) -> Tensor:
        if self.output == "softmax":
            return answer.log_softmax(-1)
        return bin_log_probabilities(answer, self.levels)


class _Masked(nn.Conv2d):
    """A convolution over a row up to the pixel itself, where a feature sees only colours up to its own.

    Args:
        seen: colours of the inputs. own: those of the outputs. kernel: its size.
        before: colours strictly before its own.
    """

    mask: Tensor

    def __init__(self, seen: Tensor, own: Tensor, kernel: tuple[int, int], before: bool = False) -> None:
        super().__init__(len(seen), len(own), kernel)
        mask = torch.ones_like(self.weight)
        here = seen < own[:, None] if before else seen <= own[:, None]
        mask[:, :, -1, -1] = here.to(mask.dtype)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class _Layer(nn.Module):
    """One gated layer of both stacks; its inputs come padded.

    Args:
        seen: colours of the inputs. own: those of the features. kernel: side of the square it sees, of which the upper
            half and the left of the middle row count.
        first: it sees the image itself, so neither the row (vertical) nor the colour (horizontal) it tells of.
    """

    def __init__(self, seen: Tensor, own: Tensor, kernel: int, first: bool = False) -> None:
        super().__init__()
        self.first, self.reach, self.inputs, features = first, kernel // 2, len(seen), len(own)
        self.down = nn.Conv2d(self.inputs, 2 * features, (self.reach if first else self.reach + 1, kernel))
        self.link = nn.Conv2d(2 * features, 2 * features, 1)
        self.along = _Masked(seen, own.repeat(2), (1, self.reach + 1), before=first)
        self.mix = _Masked(own, own, (1, 1))

    def across(self, h: Tensor, link: Tensor) -> Tensor:
        """The horizontal stack: (n, inputs, H, half + W), (n, 2 features, H, W) to (n, features, H, W)."""
        mixed: Tensor = self.mix(_gate(self.along(h) + link))
        return mixed if self.first else mixed + h[..., self.reach :]


def _gate(x: Tensor) -> Tensor:
    signal, gate = x.chunk(2, 1)
    return signal.tanh() * gate.sigmoid()
