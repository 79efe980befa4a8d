"""A network whose hidden features are the pixels themselves, and training images and pairs to fit detectors to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_adv.draws import Draws


class Labelled(NamedTuple):
    """Images with labels."""

    image: Tensor
    label: Tensor


class Pixels(nn.Module):
    """Two classes by the first pixel, above 0.5 or not; ``hidden`` gives the four pixels, ``pool`` their maximum."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4, dtype=torch.float64)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Linear(4, 2, dtype=torch.float64)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(4))
            self.hidden.bias.zero_()
            self.last.weight.copy_(torch.tensor([[-20.0, 0, 0, 0], [20, 0, 0, 0]]))
            self.last.bias.copy_(torch.tensor([10.0, -10.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.pool(x)
        return self.last(self.hidden(x.flatten(1)))


def training(count: int = 400, seed: int = 0) -> Labelled:
    """Two clusters in the first pixel, (0.3 or 0.7) and three pixels that hang together; (n, 1, 2, 2) float64."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 2
    mixing = torch.tensor([[0.03, 0, 0, 0], [0, 0.05, 0, 0], [0, 0.04, 0.02, 0], [0, 0, 0, 0.01]], dtype=torch.float64)
    pixels = 0.5 + torch.randn(count, 4, generator=generator, dtype=torch.float64) @ mixing.T
    pixels[:, 0] += 0.4 * label - 0.2
    return Labelled(pixels.clamp(0, 1).view(-1, 1, 2, 2), label)


def pairs(count: int = 60, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Clean images and such as were moved to 0.02 beyond the boundary, off the axes of the clusters."""
    clean = training(count, seed).image
    x_adv = clean.clone()
    side = (clean[:, 0, 0, 0] < 0.5).double() * 2 - 1
    x_adv[:, 0, 0, 0] = 0.5 + 0.02 * side
    x_adv[:, 0, 1, 1] += 0.05
    return clean, x_adv


def keyed(count: int, first: int = 0, seed: int = 0) -> Draws:
    """The draws of images ``first`` to ``first + count``."""
    index = torch.arange(first, first + count)
    return Draws(seed, index, torch.zeros_like(index))
