"""Batches, and the images of one split as a data set that gathers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from lit_adv.datamodules.sources import Source

Transform = nn.Module | Callable[..., Any]  # the dots let a YAML file name torchvision's untyped classes


class Batch(NamedTuple):
    """Images in [0, 1] with their labels and their places in the data set.

    Shape:
        image: (n, C, H, W) float32; label: (n,) int64; index: (n,) int64. The index of a validation image is
        its place in the training data.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one asks a batch for


class ImageDataset(Dataset[Batch]):
    """Some images of a source, gathered a whole batch at a time.

    Args:
        source: the data set.
        index: places in it that belong to this part, in the order in which they are served; shape (N,).
        white: pixel value that stands for 1.
        in_memory: fetch all pixels now and keep them as one uint8 tensor; else fetch them batch by batch.
        transform: applied to every image by itself, a float tensor (C, H, W) in [0, 1].
        name: the argument that ``transform`` came from, for error messages.
    """

    def __init__(
        self,
        source: Source,
        index: Tensor,
        white: int = 255,
        in_memory: bool = True,
        transform: Transform | None = None,
        name: str = "transform",
    ) -> None:
        self.source = None if in_memory else source
        self.pixels = source.images(index) if in_memory and len(index) else None
        self.labels = source.labels[index]
        self.index = index
        self.white = white
        self.transform = transform
        self.name = name

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> Batch:
        """One image, as a batch without the batch dimension."""
        batch = self.__getitems__([place])
        return Batch(batch.image[0], batch.label[0], batch.index[0])

    def __getitems__(self, places: Sequence[int]) -> Batch:
        """A batch in one piece; the loader prefers this to single images."""
        chosen = torch.as_tensor(places, dtype=torch.int64)
        if self.source is not None:
            pixels = self.source.images(self.index[chosen])
        elif self.pixels is not None:
            pixels = self.pixels[chosen]
        else:
            raise IndexError(f"place {places[0]} asked of an empty data set")
        image = pixels.to(torch.float32).div_(self.white)
        if self.transform is not None:
            image = self._transformed(self.transform, image)
        return Batch(image, self.labels[chosen], self.index[chosen])

    def _transformed(self, transform: Transform, image: Tensor) -> Tensor:
        try:
            result = torch.stack([transform(single) for single in image])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.name} failed on an image, a float tensor of shape {tuple(image.shape[1:])} in [0, 1] "
                f"({error}); leave out ToTensor and the like, and keep all results of one shape"
            ) from error
        check_images(result, self.name)
        return result


class EpochSampler(Sampler[int]):
    """A permutation that depends on seed and epoch alone.

    A trainer sets the epoch, so that a run that is taken up again sees the order it would have seen; in a
    plain loop every pass counts as the next epoch.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # torch's CPU generator uses 32 bits of its seed, so the two numbers are mixed into that many
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        self.epoch += 1
        yield from torch.randperm(self.length, generator=torch.Generator().manual_seed(int(mixed))).tolist()


def collate(batch: Batch | Sequence[Batch]) -> Batch:
    """A batch as it is, or single images made into one."""
    if isinstance(batch, Batch):
        return batch
    return Batch(*(torch.stack(parts) for parts in zip(*batch, strict=True)))


def check_images(image: Tensor, name: str) -> None:
    """Refuse images that are not floats in [0, 1].

    Args:
        image: images after the user's transforms.
        name: the argument to name in the error.

    Raises:
        ValueError: wrong type, shape or range.
    """
    remedy = "they must stay float32 tensors (C, H, W) in [0, 1]; normalise in the model's first layer"
    if image.dtype != torch.float32 or image.ndim != 4:
        raise ValueError(f"{name} gave {image.dtype} images of shape {tuple(image.shape[1:])}: {remedy}")
    low, high = (float(bound) for bound in image.aminmax())
    if not (low >= 0.0 and high <= 1.0):  # so written, nan is refused as well
        raise ValueError(f"{name} gave pixels in [{low:.3g}, {high:.3g}]: {remedy}")
