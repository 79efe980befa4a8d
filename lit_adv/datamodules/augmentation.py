"""Training augmentation of a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_adv.draws import Draws

KEY = 0x617567  # "aug": apart from the numbers an attack draws with the same seed


def crop_and_flip(image: Tensor, index: Tensor, seed: int, epoch: int, padding: int, flip: bool) -> Tensor:
    """Crop each image at random out of its zero-padded self, and mirror it or not.

    What befalls an image depends on seed, index and epoch alone, not on the batch or the process it is in.

    Args:
        image: images in [0, 1].
        index: places of the images in the data set.
        seed: seed of the run.
        epoch: epoch, from 0.
        padding: pixels added on each side before the crop, from 0.
        flip: mirror left and right with probability 1/2.

    Shape:
        image: (n, C, H, W); index: (n,); returns (n, C, H, W).
    """
    n, channels, height, width = image.shape
    draws = Draws(seed, index.to(image.device), torch.full_like(index, epoch, device=image.device), key=KEY)
    corner = draws.integers(2 * padding + 1, 2)
    columns = torch.arange(width, device=image.device).expand(n, width)
    if flip:
        columns = torch.where(draws.integers(2, 1) == 1, columns.flip(1), columns)
    rows = torch.arange(height, device=image.device) + corner[:, :1]
    places = rows[:, :, None] * (width + 2 * padding) + (columns + corner[:, 1:])[:, None, :]
    padded = F.pad(image, (padding,) * 4).flatten(2)
    chosen = places.reshape(n, 1, -1).expand(n, channels, height * width)
    return padded.gather(2, chosen).view(n, channels, height, width)
