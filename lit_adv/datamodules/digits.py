"""The 8x8 digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adv.datamodules.base import ImageDataModule
from lit_adv.datamodules.sources import PixelImages, Source


class Digits(ImageDataModule):
    """Handwritten digits, 1,797 grey images of 8x8 pixels with values 0 to 16, of which 360 are the test set.

    The test set is fixed by a permutation of its own, whatever the seed; an index is the image's place in
    scikit-learn's order, for training and test images alike.

    References:
        E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998,
        https://doi.org/10.24432/C50P49.
    """

    name = "digits"
    num_classes = 10
    dims = (1, 8, 8)
    white = 16
    test_size = 360

    def source(self, train: bool) -> Source:
        """All 1,797 images: both parts have one source."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
        return PixelImages(pixels, torch.from_numpy(bunch.target).to(torch.int64))

    def places(self, train: bool, source: Source) -> Tensor:
        """The first 360 of a fixed permutation are the test set, the others the training data."""
        order = torch.randperm(len(source.labels), generator=torch.Generator().manual_seed(0))
        return order[self.test_size :] if train else order[: self.test_size]
