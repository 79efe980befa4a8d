"""Populations in blocks."""

from __future__ import annotations

import pytest
import torch

from lit_adv.blocks import Blocks


@pytest.mark.parametrize("total", [1, 2, 5, 31, 32, 33, 100, 300])
@pytest.mark.parametrize("most", [1, 2, 7, 32, 1000])
@pytest.mark.parametrize("even", [False, True])
def test_every_sample_is_in_one_block(total: int, most: int, even: bool) -> None:
    blocks = Blocks(total, most, even)
    numbers = blocks.numbers(torch.arange(blocks.count)).flatten()
    assert numbers[numbers < total].tolist() == list(range(total))
    assert blocks.size <= max(most, 1) + (1 if even else 0)
    assert not even or blocks.size % 2 == 0
    assert (blocks.count - 1) * blocks.size < total <= blocks.count * blocks.size


def test_blocks_are_nearly_equal() -> None:
    assert (Blocks(300, 32).size, Blocks(300, 32).count) == (30, 10)
    assert (Blocks(50, 32, even=True).size, Blocks(50, 32, even=True).count) == (26, 2)
