"""Tiny ImageNet and all data sets laid out as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_adv.datamodules.base import ImageDataModule
from lit_adv.datamodules.sources import FileImages, Source, missing


class TinyImageNet(ImageDataModule):
    """Tiny ImageNet, 200 classes of 500 training images, 64x64; its labelled validation part is the test set.

    A folder holds ``wnids.txt``, ``train/<wnid>/images/``, ``val/images/`` and ``val/val_annotations.txt``.
    Classes are numbered in the order of their sorted names; ``num_classes`` is counted in ``wnids.txt``.

    Args:
        data_dir: folder of all data sets; None: the environment variable LIT_ADV_DATA, else ``data``.
        folder: the data set's folder in it.
        size: height and width in pixels, from 1; images of another size are resized (bicubic).
        in_memory: decode all images once and keep them, 12 KiB each at 64x64; else decode batch by batch.
        kwargs: arguments of :class:`ImageDataModule`.

    References:
        Y. Le and X. Yang, Tiny ImageNet Visual Recognition Challenge, 2015,
        http://cs231n.stanford.edu/reports/2015/pdfs/yle_project.pdf.
    """

    name = "tiny_imagenet"
    num_classes = 200
    dims = (3, 64, 64)
    flip = True

    def __init__(
        self,
        data_dir: str | Path | None = None,
        folder: str = "tiny-imagenet-200",
        size: int = 64,
        in_memory: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir, **kwargs)
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.folder = self.data_dir / folder
        self.name = f"{folder.replace('-', '_')}_{size}px"
        self.dims = (3, size, size)
        self.in_memory = in_memory
        if (self.folder / "wnids.txt").is_file():  # else the error comes when the images are asked for
            self.num_classes = len(self._classes())

    def source(self, train: bool) -> Source:
        """The images of one part, in the order of sorted paths (training) or of the annotations (test)."""
        samples = self._train_samples() if train else self._test_samples()
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        return FileImages([path for path, _ in samples], labels, self._fit)

    def _classes(self) -> list[str]:
        return sorted((self.folder / "wnids.txt").read_text(encoding="utf-8").split())

    def _train_samples(self) -> list[tuple[str, int]]:
        from torchvision.datasets import ImageFolder

        try:
            dataset = ImageFolder(self.folder / "train")
            if dataset.classes != self._classes():
                raise FileNotFoundError("the folders in train/ are not those that wnids.txt names")
        except OSError as error:
            raise self._missing(error) from error
        return dataset.samples

    def _test_samples(self) -> list[tuple[str, int]]:
        try:
            number = {wnid: place for place, wnid in enumerate(self._classes())}
            lines = (self.folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
            words = [line.split() for line in lines]
            images = self.folder / "val" / "images"
            return [(str(images / file), number[wnid]) for file, wnid, *_ in words]
        except (OSError, KeyError, ValueError) as error:
            raise self._missing(error) from error

    def _missing(self, error: Exception) -> FileNotFoundError:
        remedy = f"{error}; unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip, or a set of its layout, there"
        return missing("Tiny ImageNet", self.folder, remedy)

    def _fit(self, picture: Any) -> Any:
        _, height, width = self.dims
        return picture if picture.size == (width, height) else picture.resize((width, height), resample=3)
