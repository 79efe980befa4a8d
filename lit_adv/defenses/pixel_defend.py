"""PixelDefend: images are moved to more probable ones nearby, value by value, before they are classified."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from lit_adv.answers import dtype_of
from lit_adv.defense import Defense, straight_through
from lit_adv.draws import Draws
from lit_adv.inputs import check_images, class_count, precise, wide
from lit_adv.models.pixelcnn import PixelDensity

CHUNK = 16
"""Images whose conditionals are held at a time: 256 numbers for each of their values."""


class PixelDefend(Defense):
    """Purifies an image under a density of clean images, then classifies it.

    In raster order, in a pixel by colours, each value becomes the most probable level within ``eps_d`` levels of its
    own, given the values before it, *already purified*. Images are rounded to the density's levels first, also for
    ``eps_d`` 0, which leaves 8-bit images as they are. Purification is piecewise constant; the surrogate's backward
    pass is that of the identity (BPDA).

    Args:
        classifier: images (n, C, H, W) in [0, 1] to logits (n, K).
        density: of clean images, e.g. a trained ``PixelCNN``; frozen, always in eval mode.
        eps_d: radius in levels, of 255 for 8-bit images; the authors': 16 for CIFAR-10, 32 for grey images.
        once: the weaker procedure of the Adversarial Robustness Toolbox: all conditionals are computed once, given
            the values of the image as it comes in.
        num_classes: K; None: as the classifier says.

    Raises:
        ValueError: an argument out of its range, or a network that is no density; when called: images of another rank,
            with NaN, or far outside [0, 1].
    References:
        Song et al. 2018, "PixelDefend", https://arxiv.org/abs/1710.10766, algorithm 1. BPDA: Athalye, Carlini & Wagner
        2018, https://arxiv.org/abs/1802.00420, section 5.5.
    """

    def __init__(
        self,
        classifier: nn.Module,
        density: nn.Module,
        eps_d: int = 32,
        once: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(eps_d, int) or eps_d < 0:
            raise ValueError(f"eps_d must be a whole number of levels, at least 0, as 32 of 255, got {eps_d}")
        if not isinstance(density, PixelDensity):
            raise ValueError(
                f"density must give conditionals value by value, as a PixelCNN does, got {type(density).__name__}"
            )
        self.num_classes = class_count(classifier, [], num_classes)
        self.classifier, self.eps_d, self.once = classifier, eps_d, once
        self.density: PixelDensity = density.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self._classified(self.purify(x))

    def surrogate(self, x: Tensor, **draws: Draws) -> Tensor:
        return self._classified(straight_through(self.purify(x), x))

    def purify(self, x: Tensor) -> Tensor:
        """The purified images, of values k / 255, without a graph: (n, C, H, W) to the same."""
        check_images(x)
        with precise(x), torch.no_grad():
            x = wide(x.detach())
            given = x.to(dtype_of(self.density) or x.dtype)
            if self.eps_d == 0 or not len(x):
                level = self.density.quantised(given)
            elif self.once:
                level = torch.cat([self._revised_once(part) for part in torch.split(given, CHUNK)])
            else:
                level = self.density.quantised(self.density.revise(given, self._likeliest))
            return self.density.image(level, x.dtype)

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode of the classifier; the density stays in eval mode."""
        super().train(mode)
        self.density.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether the classifier collects gradients; the density never does."""
        super().requires_grad_(requires_grad)
        self.density.requires_grad_(False)
        return self

    def _likeliest(self, told: Tensor, level: Tensor) -> Tensor:
        """The most probable levels within the radius, the lowest of equals: (..., levels), (...) to (...)."""
        radius = min(self.eps_d, self.density.levels - 1)
        near = level.unsqueeze(-1) + torch.arange(-radius, radius + 1, device=level.device)
        near = near.clamp(0, self.density.levels - 1)
        best = told.gather(-1, near).argmax(-1, keepdim=True)
        return near.gather(-1, best).squeeze(-1)

    def _revised_once(self, x: Tensor) -> Tensor:
        return self._likeliest(self.density.log_conditionals(x), self.density.quantised(x))

    def _classified(self, z: Tensor) -> Tensor:
        dtype = dtype_of(self.classifier)
        return self.classifier(z.to(dtype) if dtype in (torch.float16, torch.bfloat16) else z)
