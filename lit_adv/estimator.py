"""Gradients of per-row scalar functions, from autograd or from values alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_adv.blocks import Blocks
from lit_adv.draws import Draws

RowFunction = Callable[[Tensor], Tensor]
"""``(n, [s,] C, H, W) -> (n, [s])``: a value per image, of which no row sees another."""


class GradientEstimator(ABC):
    """Gradient of a function of each row that the estimator can only call: it sees neither model nor label."""

    needs_gradient: bool = False
    """Whether it differentiates through the function (white box) or reads values only (black box)."""

    @property
    def needs_fit(self) -> bool:
        """Whether it must still learn from training images."""
        return False

    @property
    def fitted_on(self) -> str:
        """Hash of what it has learnt from; empty where it learns nothing."""
        return ""

    def fit(self, images: Tensor, labels: Tensor, path: str | None = None) -> None:
        """Learn from training images, see :meth:`lit_adv.attack.Attack.fit`."""
        return

    @abstractmethod
    def cost(self, shape: torch.Size) -> int:
        """Queries per row and call, for images of ``shape`` (C, H, W)."""

    def init(self, x: Tensor) -> Tensor:
        """The memory of fresh rows, one row each, (n, ...); (n, 0) if the estimator remembers nothing."""
        return x.new_zeros(len(x), 0)

    @abstractmethod
    def __call__(
        self, f: RowFunction, x: Tensor, memory: Tensor, draws: Draws, box: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value (n,) at ``x``, gradient (n, C, H, W) and the rows' new memory."""


class ProbeEstimator(GradientEstimator):
    """Reads values at probes around a point, a block of them at a time, and adds up what they tell.

    An attack asks the blocks one pass after another, so that memory does not grow with the number of probes and an
    image may leave in the midst of an estimate; calling the estimator runs them all.

    Attributes:
        block: most probes per image in one forward.
        paired: probes come in pairs, side by side, which no block may part.
        clip: probes are cut to the box, to ball and box, or not at all. Where the estimator is called by itself there
            is no ball, and ``ball`` means the box.
    """

    block: int = 62
    paired: bool = True
    clip: Literal["none", "box", "ball"] = "none"

    @abstractmethod
    def probes(self, shape: torch.Size) -> int:
        """Probes per estimate, without the point itself."""

    @abstractmethod
    def ask(self, x: Tensor, memory: Tensor, draws: Draws, first: Tensor, out: Tensor) -> Tensor:
        """Write a block of probes, and return what :meth:`gather` must know of them.

        Args:
            first: number of each row's first probe in this block, (n,).
            out: (n, s, C, H, W), to be filled with probes ``first`` to ``first + s - 1``; what stands in places from
                :meth:`probes` on is never asked.

        Returns:
            (n, ...), the directions of the probes, say.
        """

    @abstractmethod
    def gather(self, told: Tensor, probes: Tensor, values: Tensor, x: Tensor, value: Tensor) -> Tensor:
        """What a block adds to the estimate, (n, C, H, W) or any other shape (n, ...) that :meth:`finish` takes.

        Args:
            told: from :meth:`ask`. probes: as asked, after clipping, (n, s, C, H, W).
            values: (n, s), NaN where not known. value: (n,) at ``x`` itself.
        """

    def finish(self, total: Tensor, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient (n, C, H, W) from the sum over all blocks, and the rows' new memory."""
        return total, memory

    def empty(self, x: Tensor) -> Tensor:
        """The sum before the first block."""
        return torch.zeros_like(x)

    def blocks(self, shape: torch.Size) -> Blocks:
        """How the probes are cut into blocks."""
        return Blocks(self.probes(shape), self.block, self.paired)

    def cost(self, shape: torch.Size) -> int:
        return self.probes(shape) + 1

    def __call__(
        self, f: RowFunction, x: Tensor, memory: Tensor, draws: Draws, box: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        blocks = self.blocks(x.shape[1:])
        value, total = f(x), self.empty(x)
        for number in range(blocks.count):
            phase = torch.full((len(x),), number, device=x.device)
            probes = x.new_empty(len(x), blocks.size, *x.shape[1:])
            told = self.ask(x, memory, draws, phase * blocks.size, probes)
            known = blocks.numbers(phase) < blocks.total
            probes = torch.where(known[:, :, None, None, None], probes, x.unsqueeze(1))
            probes = probes.clamp_(*box) if self.clip != "none" else probes
            values = torch.where(known, f(probes), torch.nan)
            total = total + self.gather(told, probes, values, x, value)
        gradient, memory = self.finish(total, x, memory)
        return value, gradient, memory
