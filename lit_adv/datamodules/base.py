"""What all image data modules share: the splits, the loaders and the checks."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_adv.datamodules.augmentation import crop_and_flip
from lit_adv.datamodules.dataset import Batch, EpochSampler, ImageDataset, Transform, collate
from lit_adv.datamodules.sources import Source, default_data_dir

__all__ = ["Batch", "ImageDataModule", "Split"]

Split = Literal["train", "val", "test"]


class ImageDataModule(LightningDataModule, ABC):
    """Splits and loaders of an image data set for training, validation and test.

    The validation images are held out of the training data by a permutation that ``seed`` fixes, never taken
    from the test set. All loaders yield :class:`Batch`; the test set is predicted on, too. Augmentation
    happens to training batches under a trainer, on its device; the loaders themselves give the images as they
    are.

    Args:
        data_dir: folder of all data sets; None: the environment variable LIT_ADV_DATA, else ``data``.
        val_split: share of the training images held out for validation, in [0, 1), or their number.
        num_workers: loader processes, from 0; what lies in memory needs none.
        normalize: must stay False: normalisation is the model's first layer.
        batch_size: images in a batch, from 1; per process.
        seed: fixes the split, the order of training images and the augmentation; from 0.
        shuffle: give the training images in a new order every epoch.
        pin_memory: copy batches to page-locked memory; without a CUDA device it is not done.
        drop_last: leave out a last training batch that is not full; evaluation always sees every image.
        train_transforms: applied to every training image, a float tensor (C, H, W) in [0, 1], and must keep
            that range; draws from torch's global generator.
        val_transforms: the same for validation images.
        test_transforms: the same for test images.
        augment: random crops of training images padded by an eighth of their height, and random mirroring
            where that leaves the class as it is.
        max_train: training images to keep, from 1: the first ones of the permutation, once the validation
            images are set aside; None: all.
        max_test: test images to keep, from 1: the first ones; None: all.

    Raises:
        ValueError: an argument is out of its range.
    """

    name: str = ""
    num_classes: int = 0
    dims: tuple[int, int, int] = (0, 0, 0)
    white: int = 255  # pixel value that stands for 1
    flip: bool = False  # mirroring keeps the class
    in_memory: bool = True

    def __init__(
        self,
        data_dir: str | Path | None = None,
        val_split: int | float = 0.2,
        num_workers: int = 0,
        normalize: bool = False,
        batch_size: int = 32,
        seed: int = 42,
        shuffle: bool = True,
        pin_memory: bool = True,
        drop_last: bool = False,
        train_transforms: Transform | None = None,
        val_transforms: Transform | None = None,
        test_transforms: Transform | None = None,
        augment: bool = False,
        max_train: int | None = None,
        max_test: int | None = None,
    ) -> None:
        super().__init__()
        if normalize:
            raise ValueError(
                "normalize must be False, got True: images stay in [0, 1], where attacks are measured; "
                "normalise in the model's first layer"
            )
        held_out(val_split, None)
        _check_least("num_workers", num_workers, 0)
        _check_least("batch_size", batch_size, 1)
        _check_least("seed", seed, 0)
        _check_least("max_train", max_train, 1)
        _check_least("max_test", max_test, 1)
        self.data_dir = default_data_dir() if data_dir is None else Path(data_dir)
        self.val_split = val_split
        self.num_workers = num_workers
        self.normalize = normalize
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.train_transforms = train_transforms
        self.val_transforms = val_transforms
        self.test_transforms = test_transforms
        self.augment = augment
        self.max_train = max_train
        self.max_test = max_test
        self._datasets: dict[Split, ImageDataset] = {}

    @abstractmethod
    def source(self, train: bool) -> Source:
        """All training images, or all test images."""

    def places(self, train: bool, source: Source) -> Tensor:
        """Places in the source that belong to the training data, or to the test set, in their order."""
        return torch.arange(len(source.labels))

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs: "fit" and "validate", "test" and "predict", or everything."""
        if stage in (None, "fit", "validate"):
            self.dataset("train")
        if stage in (None, "test", "predict"):
            self.dataset("test")

    def dataset(self, split: Split) -> ImageDataset:
        """The images of one split, without augmentation, loaded when first asked for."""
        if split not in self._datasets:
            if split == "test":
                self._load_test()
            else:
                self._load_training()
        return self._datasets[split]

    def training_images(self, most: int = 10_000) -> Batch:
        """Training images in one piece, neither augmented nor transformed: for what an attack learns from data.

        Args:
            most: the first so many of the split's random order.
        """
        dataset = self.untransformed("train")
        return dataset.__getitems__(range(min(most, len(dataset))))

    def untransformed(self, split: Split) -> ImageDataset:
        """The images of one split as they are stored, whatever transforms the loaders apply."""
        dataset = copy.copy(self.dataset(split))
        dataset.transform = None
        return dataset

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of training images, in a new order every epoch if ``shuffle``."""
        dataset = self.dataset("train")
        if self.drop_last and len(dataset) < self.batch_size:
            raise ValueError(
                f"drop_last=True leaves nothing of {len(dataset)} training images at "
                f"batch_size={self.batch_size}; lower batch_size or set drop_last=False"
            )
        sampler = EpochSampler(len(dataset), self.seed) if self.shuffle else None
        return self._loader(dataset, sampler=sampler, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Batches of validation images; no loader at all where ``val_split`` holds none out."""
        dataset = self.dataset("val")
        return self._loader(dataset) if len(dataset) else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of test images."""
        return self._loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The same as :meth:`test_dataloader`."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment a training batch where it is to be used."""
        if not (self.augment and isinstance(batch, Batch) and self.trainer is not None and self.trainer.training):
            return batch
        padding = max(1, batch.image.shape[-2] // 8)
        epoch = self.trainer.current_epoch
        return batch._replace(image=crop_and_flip(batch.image, batch.index, self.seed, epoch, padding, self.flip))

    def _loader(self, dataset: ImageDataset, **options: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=_generator(self.seed),  # its own: loading must not move the global one
            **options,
        )

    def _load_training(self) -> None:
        source = self._checked_source(train=True)
        places = self.places(True, source)
        kept = len(places) - held_out(self.val_split, len(places))
        order = places[torch.randperm(len(places), generator=_generator(self.seed))]
        self._datasets["train"] = self._part("train", source, order[:kept][: self.max_train])
        self._datasets["val"] = self._part("val", source, order[kept:])

    def _load_test(self) -> None:
        source = self._checked_source(train=False)
        self._datasets["test"] = self._part("test", source, self.places(False, source)[: self.max_test])

    def _part(self, split: Split, source: Source, index: Tensor) -> ImageDataset:
        name = f"{split}_transforms"
        return ImageDataset(source, index, self.white, self.in_memory, getattr(self, name), name)

    def _checked_source(self, train: bool) -> Source:
        source = self.source(train)
        labels = source.labels
        if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            found = f"{len(labels)} labels" + (f" up to {int(labels.max())}" if len(labels) else "")
            raise ValueError(
                f"{self.name} in {self.data_dir.absolute()} must have labels 0 to {self.num_classes - 1}, "
                f"got {found}; restore the files"
            )
        return source


def held_out(val_split: int | float, total: int | None) -> int:
    """Number of validation images for a ``val_split``; with ``total`` None only its form is checked.

    Args:
        val_split: share in [0, 1) or whole number of images, from 0.
        total: number of training images to hold them out of.

    Raises:
        ValueError: out of range, or no image would be left to train on.
    """
    share = isinstance(val_split, float)
    if isinstance(val_split, bool) or val_split < 0 or (share and not val_split < 1):
        raise ValueError(f"val_split must lie in [0, 1) or be a whole number of images, got {val_split}")
    if total is None:
        return 0
    count = int(val_split * total) if share else int(val_split)
    if count >= total:
        raise ValueError(f"val_split must leave images to train on, got {val_split} of {total}; lower it")
    return count


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
