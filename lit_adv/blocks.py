"""Populations asked in blocks, so that memory does not grow with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """A population of ``total`` samples, cut into blocks of nearly equal size.

    Args:
        total: samples of the population.
        most: samples of a block at most.
        even: blocks of an even size, for samples that come in pairs.
    """

    total: int
    most: int
    even: bool = False

    @property
    def size(self) -> int:
        """Samples per block; the last block may hold places beyond the population."""
        size = -(-self.total // -(-self.total // max(1, self.most)))
        return size + (size % 2 if self.even else 0)

    @property
    def count(self) -> int:
        """Blocks of the population."""
        return -(-self.total // self.size)

    def numbers(self, phase: Tensor) -> Tensor:
        """Numbers of the samples in each row's block: (n,) -> (n, size); those from ``total`` on do not exist."""
        return phase[:, None] * self.size + torch.arange(self.size, device=phase.device)
