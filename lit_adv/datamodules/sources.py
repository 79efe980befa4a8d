"""Where images come from: pixels in memory, JPEG bytes in memory, or files decoded when asked for."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

DATA_VARIABLE = "LIT_ADV_DATA"


class Source(Protocol):
    """The images of one data set with their labels, addressed by their place in it.

    ``labels`` is an int64 tensor of shape (N,); ``images`` takes places (n,) and gives uint8 (n, C, H, W).
    """

    @property
    def labels(self) -> Tensor: ...

    def images(self, places: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PixelImages:
    """Images kept as one uint8 tensor of shape (N, C, H, W)."""

    pixels: Tensor
    labels: Tensor

    def images(self, places: Tensor) -> Tensor:
        return self.pixels[places]


@dataclass(frozen=True)
class JpegImages:
    """Images kept as JPEG files, one after another: image k is ``data[offsets[k]:offsets[k + 1]]``."""

    data: bytes
    offsets: Sequence[int]
    labels: Tensor

    def images(self, places: Tensor) -> Tensor:
        from PIL import Image

        files = (self.data[self.offsets[k] : self.offsets[k + 1]] for k in places.tolist())
        return torch.stack([to_pixels(Image.open(io.BytesIO(file))) for file in files])


@dataclass(frozen=True)
class FileImages:
    """Images in files, one a file, brought to one size by ``fit``."""

    paths: Sequence[str]
    labels: Tensor
    fit: Callable[[Image], Image]

    def images(self, places: Tensor) -> Tensor:
        return torch.stack([self._image(self.paths[k]) for k in places.tolist()])

    def _image(self, path: str) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as picture:
                return to_pixels(self.fit(picture.convert("RGB")))
        except OSError as error:
            raise ValueError(f"cannot read the image {path}: {error}; restore or remove this file") from error


def to_pixels(picture: Image) -> Tensor:
    """A picture as a uint8 tensor (3, H, W)."""
    colour = picture if picture.mode == "RGB" else picture.convert("RGB")
    return torch.from_numpy(np.array(colour)).permute(2, 0, 1)


def default_data_dir() -> Path:
    """The folder of all data sets: the variable LIT_ADV_DATA, else ``data`` in the working directory."""
    return Path(os.environ.get(DATA_VARIABLE) or "data")


def missing(what: str, folder: Path, remedy: str) -> FileNotFoundError:
    """The one error for data that are not there."""
    return FileNotFoundError(
        f"no usable {what} in {folder.absolute()}: {remedy}, or name the folder of all data sets by data_dir "
        f"or the environment variable {DATA_VARIABLE}"
    )


def torchvision_dataset(kind: str, root: Path, train: bool, download: bool = False) -> Any:
    """The data set ``torchvision.datasets.<kind>``, downloaded into ``root`` only if it is not there yet.

    Raises:
        FileNotFoundError: it is absent or damaged, and was not to be or could not be downloaded.
    """
    from torchvision import datasets

    make = getattr(datasets, kind)
    try:
        return make(root=root, train=train, download=False)
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError) as error:
        if not download:
            raise missing(kind, root, "call prepare_data() to download it") from error
    try:
        return make(root=root, train=train, download=True)
    except (RuntimeError, OSError, ValueError, EOFError, AssertionError) as error:
        by_hand = f"the download failed ({error}); fetch torchvision's {kind} by hand into that folder"
        raise missing(kind, root, by_hand) from error
