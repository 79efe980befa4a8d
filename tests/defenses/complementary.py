"""Small complementary defences whose margins are known or smooth."""

from __future__ import annotations

from typing import Any

import torch
from contracts.nets import Small
from torch import Tensor, nn

from lit_adv.defenses import GuidedComplementary
from lit_adv.detector import NetworkDetector
from lit_adv.detectors import ImageDetector, SensitivityDetector
from lit_adv.draws import Draws
from lit_adv.response import Response

ODD = (3, 5, 7)
STRENGTH = 64.0


class Pixel(nn.Module):
    """Two logits whose margin is 64 (v - 1/2) of one pixel v of the first channel."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, x: Tensor) -> Tensor:
        margin = STRENGTH * (x[:, 0, 0, self.column] - 0.5)
        return torch.stack([torch.zeros_like(margin), margin], 1)


class Told(NetworkDetector):
    """Stands for the sensitivity detector; looks at a pixel of the image."""

    def view(self, response: Response) -> Tensor:
        return response.x


def told(classifier: nn.Module, **settings: Any) -> GuidedComplementary:
    """Margins of the image detector lie in the image's first pixel, of the sensitivity detector in its second."""
    detectors = ImageDetector(classifier, Pixel(0)), Told(classifier, Pixel(1))
    return GuidedComplementary(classifier, *detectors, **settings).eval()


def with_margins(x: Tensor, image: Tensor, sensitivity: Tensor) -> Tensor:
    """The images (n, ...), as :func:`told` is told margins (n,) by them."""
    x = x.clone()
    x[:, 0, 0, 0] = image / STRENGTH + 0.5
    x[:, 0, 0, 1] = sensitivity / STRENGTH + 0.5
    return x


def smooth(shape: tuple[int, int, int] = ODD, **settings: Any) -> GuidedComplementary:
    """Networks of one hidden tanh layer in float64, the surer one of either kind on some images."""
    classifier = Small(4, shape, 11)
    detectors = (
        ImageDetector(classifier, Small(2, shape, 12)),
        SensitivityDetector(classifier, Small(2, shape, 13)),
    )
    generator = torch.Generator().manual_seed(14)
    detectors[1].calibrate([torch.rand(32, *shape, generator=generator, dtype=torch.float64)])
    return GuidedComplementary(
        classifier, *detectors, **{"rectifier": Small(4, shape, 15), "num_classes": 4, **settings}
    ).eval()


def keyed(count: int, seed: int = 5, first: int = 0) -> Draws:
    """Draws of images ``first`` and on."""
    index = torch.arange(count) + first
    return Draws(seed, index, index * 3, key=-1)
