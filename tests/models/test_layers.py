"""Padding as TensorFlow defines "same", against a loop over windows."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adv.models.layers import SamePad2d, check_positive


def same_convolution(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """TensorFlow's documented rule, element by element: output i looks at input i * stride - before + u."""
    height, width = x.shape
    side = kernel.shape[0]
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)

    def before(size: int) -> int:
        total = max(side - stride, 0) if size % stride == 0 else max(side - size % stride, 0)
        return total // 2

    out = torch.zeros(rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            for u in range(side):
                for v in range(side):
                    r, c = i * stride - before(height) + u, j * stride - before(width) + v
                    if 0 <= r < height and 0 <= c < width:
                        out[i, j] += x[r, c] * kernel[u, v]
    return out


@pytest.mark.parametrize("size", [(6, 6), (7, 6), (5, 9)])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (5, 2), (8, 2), (4, 3), (1, 2)])
def test_same_padding_equals_brute_force(size: tuple[int, int], side: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, generator=generator, dtype=torch.float64)
    kernel = torch.rand(side, side, generator=generator, dtype=torch.float64)
    out = F.conv2d(SamePad2d(side, stride)(x[None, None]), kernel[None, None], stride=stride)
    torch.testing.assert_close(out[0, 0], same_convolution(x, kernel, stride))


def test_even_sides_are_padded_right_and_bottom_only() -> None:
    out = SamePad2d(3, 2)(torch.ones(1, 1, 4, 4))
    assert out.shape == (1, 1, 5, 5)
    assert out[0, 0, :4, :4].min() == 1
    assert out[0, 0, 4].max() == out[0, 0, :, 4].max() == 0


@pytest.mark.parametrize("value", [0, -1, 1.5, (3, 0), [], [[1], []], None])
def test_sizes_must_be_positive_whole_numbers(value: object) -> None:
    with pytest.raises(ValueError, match="widths"):
        check_positive(units=2, widths=value)


def test_positive_sizes_pass_at_any_depth() -> None:
    check_positive(a=1, b=(2, 3), c=[[4], (5, 6)])
