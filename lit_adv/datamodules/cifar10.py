"""CIFAR-10, and a copy of it that was coded as JPEG."""

from __future__ import annotations

import zipfile

import numpy as np
import torch

from lit_adv.datamodules.base import ImageDataModule
from lit_adv.datamodules.sources import JpegImages, PixelImages, Source, missing, torchvision_dataset


class CIFAR10(ImageDataModule):
    """Ten classes of objects, 50,000 training and 10,000 test images; ``<data_dir>/cifar-10-batches-py``.

    References:
        A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
        https://www.cs.toronto.edu/~kriz/cifar.html.
    """

    name = "cifar10"
    num_classes = 10
    dims = (3, 32, 32)
    flip = True

    def prepare_data(self) -> None:
        """Download what is absent."""
        torchvision_dataset("CIFAR10", self.data_dir, train=True, download=True)

    def source(self, train: bool) -> Source:
        """The images of one part, in the files' order."""
        dataset = torchvision_dataset("CIFAR10", self.data_dir, train)
        pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        return PixelImages(pixels, torch.tensor(dataset.targets))


class CIFAR10Jpeg(ImageDataModule):
    """CIFAR-10 coded as JPEG, quality 75, in CIFAR-10's order; ``<data_dir>/cifar10_jpeg/{train,test}.npz``.

    The pixels differ from the original's by 6/255 on average, as much as common attack budgets, so no figure
    from here compares with one from CIFAR-10. Each file holds ``jpeg`` (all JPEG files, one after another,
    uint8), ``offsets`` (where each begins, and the end) and ``labels``.
    """

    name = "cifar10_jpeg"
    num_classes = 10
    dims = (3, 32, 32)
    flip = True

    def source(self, train: bool) -> Source:
        """The images of one part, in CIFAR-10's order."""
        path = self.data_dir / "cifar10_jpeg" / ("train.npz" if train else "test.npz")
        try:
            with np.load(path) as arrays:
                data, offsets = arrays["jpeg"].tobytes(), arrays["offsets"].tolist()
                labels = torch.from_numpy(arrays["labels"].astype(np.int64))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            remedy = f"{path.name} cannot be read ({error}); this copy of CIFAR-10 is not downloaded, put it there"
            raise missing("CIFAR-10 as JPEG", path.parent, remedy) from error
        return JpegImages(data, offsets, labels)
