"""Images at which attacks that see labels alone may begin."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from lit_adv.fingerprint import digest


class OtherImages:
    """Where an attack by labels may begin: of each image the nearest of another class (or of the target's).

    Noise is no beginning where a detector refuses it.

    Args:
        images, labels: training images (n, C, H, W) and their classes (n,).
        known_by: what stands for them in the attack's configuration, so that records tell where the attack began;
            "": a hash of both.
    """

    def __init__(self, images: Tensor, labels: Tensor, known_by: str = "") -> None:
        self._images, self._labels = images, labels
        self.known_by = known_by or bytes(digest({"images": images, "labels": labels}, "starts").tolist()).hex()[:16]

    def __call__(self, x0: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        allowed = self._labels != y[:, None] if target is None else self._labels == target[:, None]
        far = torch.cdist(x0.flatten(1), self._images.to(x0.dtype).flatten(1)).masked_fill(~allowed, inf)
        return self._images[far.argmin(1)].to(x0.dtype)
