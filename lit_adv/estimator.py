"""Gradients of per-row scalar functions, from autograd or from values alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lit_adv.draws import Draws

RowFunction = Callable[[Tensor], Tensor]
"""``(n, [s,] C, H, W) -> (n, [s])``: a value per image, of which no row sees another."""


class GradientEstimator(ABC):
    """Gradient of a function of each row that the estimator can only call: it sees neither model nor label."""

    needs_gradient: bool = False
    """Whether it differentiates through the function (white box) or reads values only (black box)."""

    @abstractmethod
    def cost(self, shape: torch.Size) -> int:
        """Queries per row and call, for images of ``shape`` (C, H, W)."""

    def init(self, x: Tensor) -> Tensor:
        """The memory of fresh rows, one row each; (n, 0) if the estimator remembers nothing."""
        return x.new_zeros(len(x), 0)

    @abstractmethod
    def __call__(
        self, f: RowFunction, x: Tensor, memory: Tensor, draws: Draws, box: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value (n,) at ``x``, gradient (n, C, H, W) and the rows' new memory."""
