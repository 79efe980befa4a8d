"""ImageNet as a tree of folders, or a few samples of it with a list of labels."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_adv.datamodules.base import ImageDataModule
from lit_adv.datamodules.sources import FileImages, Source, missing


class ImageNet(ImageDataModule):
    """ImageNet's photographs, resized and cropped at the centre; its validation part is the test set.

    A folder holds either ``train/<wnid>/`` and ``val/<wnid>/``, or a ``labels.csv`` with the columns ``file``
    and ``imagenet_index`` beside the images, which makes a test set alone. A tree's test images come in a
    fixed random order, as the files' own order shows one class after another.

    Args:
        data_dir: folder of all data sets; None: the environment variable LIT_ADV_DATA, else ``data``.
        folder: the data set's folder in it.
        size: height and width of the crop in pixels, from 1.
        resize: length of the shorter side before the crop in pixels, at least ``size``.
        num_classes: classes a model must tell apart, from 1; a tree must have as many.
        in_memory: decode all images once and keep them, 147 KiB each at 224x224; else decode batch by batch.
        kwargs: arguments of :class:`ImageDataModule`.

    References:
        O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015,
        https://arxiv.org/abs/1409.0575.
    """

    name = "imagenet"
    num_classes = 1000
    dims = (3, 224, 224)
    flip = True

    def __init__(
        self,
        data_dir: str | Path | None = None,
        folder: str = "imagenet",
        size: int = 224,
        resize: int = 256,
        num_classes: int = 1000,
        in_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir, **kwargs)
        if not 1 <= size <= resize:
            raise ValueError(f"size must be at least 1 and at most resize={resize}, got {size}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.folder = self.data_dir / folder
        self.name = f"{folder.replace('-', '_')}_{size}px"
        self.dims = (3, size, size)
        self.resize = resize
        self.num_classes = num_classes
        self.in_memory = in_memory

    def source(self, train: bool) -> Source:
        """The images of one part, in the order of their list or of their sorted paths."""
        listed = self.folder / "labels.csv"
        if not listed.is_file():
            samples = self._tree("train" if train else "val")
        elif train:
            raise ValueError(f"{self.folder.absolute()} has a labels.csv, so it is a test set: it cannot be trained on")
        else:
            samples = self._listed(listed)
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        return FileImages([path for path, _ in samples], labels, self._fit)

    def places(self, train: bool, source: Source) -> Tensor:
        """All of them; a tree's test images in a fixed random order."""
        count = len(source.labels)
        if train or (self.folder / "labels.csv").is_file():
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(0))

    def _listed(self, path: Path) -> list[tuple[str, int]]:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        try:
            return [(str(self.folder / row["file"]), int(row["imagenet_index"])) for row in rows]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} must have columns file and imagenet_index in every row: {error}") from error

    def _tree(self, part: str) -> list[tuple[str, int]]:
        from torchvision.datasets import ImageFolder

        try:
            dataset = ImageFolder(self.folder / part)
        except OSError as error:
            remedy = f"{error}; put train/<wnid>/ and val/<wnid>/, or images and a labels.csv, there"
            raise missing("ImageNet", self.folder, remedy) from error
        if len(dataset.classes) != self.num_classes:
            raise ValueError(
                f"num_classes must be the number of folders in {self.folder.absolute() / part}, "
                f"{len(dataset.classes)}, got {self.num_classes}"
            )
        return dataset.samples

    def _fit(self, picture: Any) -> Any:
        from torchvision.transforms import functional

        return functional.center_crop(functional.resize(picture, self.resize), [self.dims[1]])
