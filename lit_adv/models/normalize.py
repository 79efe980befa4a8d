"""What stands before a network's first weight: a check of the shape and the normalisation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtracts a mean per channel and divides by a standard deviation per channel.

    Both are buffers, so they follow the model between devices and lie in its checkpoint.

    Args:
        mean: in units of the image, which is in [0, 1]; one number per channel, or one for all.
        std: positive, as many numbers as ``mean``.

    Shape:
        (n, C, H, W) to (n, C, H, W).

    Raises:
        ValueError: if the two differ in length, are empty, or a deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise ValueError(f"mean and std must hold one number per channel each, got {list(mean)} and {list(std)}")
        if not all(s > 0 for s in std):
            raise ValueError(f"std must be positive in every channel, got {list(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.get_default_dtype()).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.get_default_dtype()).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class StandardizeImage(nn.Module):
    """Gives each image mean 0 and deviation 1 over all its channels and pixels.

    Computes ``(x - mean) / max(std, 1 / sqrt(d))`` with ``d`` the number of elements of an image, so that a
    constant image becomes 0. The result is the same for images in [0, 1] and in [0, 255], but for that floor.

    Shape:
        (n, C, H, W) to (n, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((1, 2, 3), keepdim=True)
        variance = centred.square().mean((1, 2, 3), keepdim=True)
        # the floor comes before the root: the root's own gradient at 0 is infinite, and times 0 gives nan
        return centred * variance.clamp(min=1 / x.shape[1:].numel()).rsqrt()


class ImageInput(nn.Module):
    """The first layer of every network here: refuses what is no batch of its images, then normalises.

    The check looks at shape and type only, so it costs nothing.

    Args:
        channels: of the images.
        image_size: height and width in pixels that the network takes, or None if it takes any.
        mean: per channel; None for no normalisation (then ``std`` is None too).
        std: per channel.
        standardize: normalise each image by its own mean and deviation where ``mean`` is None.
        least_size: sides shorter than this many pixels are padded with zeros evenly, before normalisation.

    Shape:
        (n, C, H, W) to (n, C, max(H, least_size), max(W, least_size)).

    Raises:
        ValueError: if ``mean`` does not fit ``std`` or ``channels``; when called, if the shape is wrong.
    """

    def __init__(
        self,
        channels: int,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        standardize: bool = False,
        least_size: int = 1,
    ) -> None:
        super().__init__()
        if mean is not None and len(mean) not in (1, channels):
            raise ValueError(f"mean must hold 1 number or one for each of {channels} channels, got {list(mean)}")
        self.channels = channels
        self.image_size = image_size
        self.least_size = least_size
        self.normalize: nn.Module
        if mean is not None and std is not None:
            self.normalize = Normalize(mean, std)
        elif mean is None and std is None:
            self.normalize = StandardizeImage() if standardize else nn.Identity()
        else:
            raise ValueError(f"mean and std must be given together or not at all, got {mean} and {std}")

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        missing = [max(self.least_size - side, 0) for side in (x.shape[3], x.shape[2])]
        if any(missing):
            x = F.pad(x, [part for m in missing for part in (m // 2, m - m // 2)])
        return self.normalize(x)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, image_size={self.image_size}, least_size={self.least_size}"

    def _check(self, x: Tensor) -> None:
        size = self.image_size
        right = x.dim() == 4 and x.shape[1] == self.channels and 0 not in x.shape[2:]
        if not (right and (size is None or (x.shape[2] == size and x.shape[3] == size))):
            sides = "H, W" if size is None else f"{size}, {size}"
            remedy = "add a batch dimension by x[None]" if x.dim() == 3 else "check the model's arguments"
            raise ValueError(f"images must have shape (n, {self.channels}, {sides}), got {tuple(x.shape)}: {remedy}")
        if not x.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1], got {x.dtype}: divide 8-bit images by 255")
