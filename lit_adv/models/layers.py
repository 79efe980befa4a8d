"""Layers that several networks share."""

import torch.nn.functional as F
from torch import Tensor, nn


class SamePad2d(nn.Module):
    """Pads as TensorFlow's "same" does, for the convolution or pooling that follows.

    The output then has ``ceil(side / stride)`` pixels a side. What cannot be split evenly goes to the right
    and to the bottom: with stride 2 on an even side a 3x3 window is padded there alone, whereas symmetric
    padding would shift the grid by a pixel.

    Args:
        kernel: side of the window in pixels.
        stride: of the window in pixels.

    Shape:
        (n, C, H, W) to (n, C, H + p, W + q).
    """

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = self._sides(x.shape[2])
        left, right = self._sides(x.shape[3])
        return F.pad(x, (left, right, top, bottom))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}"

    def _sides(self, size: int) -> tuple[int, int]:
        covered = (-(-size // self.stride) - 1) * self.stride + self.kernel
        total = max(covered - size, 0)
        return total // 2, total - total // 2


def check_positive(**sizes: object) -> None:
    """Refuses a size that is no positive whole number, or a sequence with one that is not.

    Args:
        sizes: numbers, or sequences of numbers at any depth, by the name of the argument.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in sizes.items():
        if not _positive(value):
            raise ValueError(f"{name} must hold positive whole numbers only, got {value}")


def _positive(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_positive(item) for item in value)
    return isinstance(value, int) and value > 0
