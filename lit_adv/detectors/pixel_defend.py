"""DET_PD: how improbable an image is under a density of clean images."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from lit_adv.answers import dtype_of
from lit_adv.defense import straight_through
from lit_adv.detector import Detector, Images
from lit_adv.draws import Draws
from lit_adv.inputs import check_images, precise, wide

CHUNK = 128


class Likelihood(Detector):
    """Suspects images that a density of clean images finds improbable: the score is ``-log p(x)`` in nats.

    Images are rounded to 8 bits before, which may itself undo an attack: look again whether it still succeeds. Nothing
    is trained but the density. Differentiable in the image, the rounding straight-through.

    Args:
        classifier: the network it protects; not asked; None: the detector serves any.
        density: images (n, C, H, W) in [0, 1] to log-probabilities (n,) in nats, e.g. a trained ``PixelCNN``; frozen.
        p_value: score by ``1 - p``, with ``p = (1 + #{i: p(x_i) <= p(x)}) / (N + 1)`` over the N training images given
            to :meth:`fit`. The same ranking but for ties, of which there are many: all images less probable than
            every training image have one score. Its gradient is that of ``-log p(x)``.

    Attributes:
        known: log-probabilities of the training images in rising order, (N,); empty before :meth:`fit`.

    Raises:
        ValueError: when asked: images of another rank, with NaN or far outside [0, 1]; a p-value before ``fit``.
    References:
        Song et al. 2018, "PixelDefend", https://arxiv.org/abs/1710.10766, section 3.1; DET_PD of Li et al. 2020,
        "Are L2 adversarial examples intrinsically different?".
    """

    known: Tensor

    def __init__(self, classifier: nn.Module | None, density: nn.Module, p_value: bool = False) -> None:
        super().__init__(classifier)
        self.density, self.p_value = density.eval().requires_grad_(False), p_value
        self.register_buffer("known", torch.zeros(0))

    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        check_images(x)
        x = wide(x)
        surprise = -self._log_prob(x)
        if not self.p_value:
            return surprise
        if not len(self.known):
            raise ValueError("a p-value needs training images to compare with: call fit first, or p_value=False")
        value = -surprise.detach().to(self.known.dtype)
        rank = torch.searchsorted(self.known, value, right=True)  # of training images no more probable
        p = (1 + rank).to(surprise.dtype) / (len(self.known) + 1)
        return straight_through(1 - p, surprise) if surprise.requires_grad else 1 - p

    @torch.no_grad()
    def fit(self, training: Images, clean: Tensor, x_adv: Tensor) -> None:
        """Note the log-probabilities of clean training images, for p-values; the pairs are not looked at."""
        if not self.p_value:
            return
        if not len(training.image):
            raise ValueError("training holds no images, so there is nothing to compare with: give some")
        told = torch.cat([self._log_prob(wide(part)) for part in torch.split(training.image, CHUNK)])
        if told.isnan().any():
            raise ValueError(f"the density is NaN for {int(told.isnan().sum())} training images: train it again")
        self.known = told.sort().values.to(self.known.device)

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; classifier and density stay in eval mode."""
        super().train(mode)
        self.density.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Nothing here collects gradients."""
        super().requires_grad_(requires_grad)
        self.density.requires_grad_(False)
        return self

    def _log_prob(self, x: Tensor) -> Tensor:
        graph = x.requires_grad and torch.is_grad_enabled()
        with precise(x), torch.set_grad_enabled(graph):
            told: Tensor = self.density((x.clone() if x.is_inference() else x).to(dtype_of(self.density) or x.dtype))
        if told.shape != x.shape[:1]:
            raise ValueError(
                f"density must return one log-probability per image, {tuple(x.shape[:1])}, got shape "
                f"{tuple(told.shape)}: take a density, e.g. lit_adv.models.PixelCNN"
            )
        return told.to(x.dtype)
