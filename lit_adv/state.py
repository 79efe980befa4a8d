"""The rows under attack at present, and what a search must know of its attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel


class Rules(Protocol):
    """What a search must know of its attack; see :class:`lit_adv.attack.IterativeAttack`."""

    threat: ThreatModel
    access: Access
    seed: int
    steps: int
    restarts: int
    minimizes_distance: bool
    stop_at_hit: bool
    needs_whole_step: bool
    looks_first: bool
    confidence: float
    leaving: Callable[[Any], None] | None

    def cost(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        """Images each row may ask about in its next step."""
        ...

    def least(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        """Images a row must be able to pay for to begin its next pass."""
        ...


@dataclass(kw_only=True)
class State:
    """The rows under attack at present, one entry per row in every tensor field; subclasses add fields.

    ``state[keep]`` selects rows and ``state + other`` joins them, so every field has one shape for all rows.

    Attributes:
        x: (n, C, H, W) the current candidates. x0: the clean images. y: (n,) labels. target: (n,) or None.
        rows: (n,) places in the caller's batch. t: (n,) each row's own step number.
        done: (n,) bool, the attack has no more to try. inside: (n,) bool, in the midst of a step (between blocks
            of a population): the step number stays.
    """

    x: Tensor
    x0: Tensor
    y: Tensor
    target: Tensor | None
    rows: Tensor
    t: Tensor
    done: Tensor
    inside: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, keep: Tensor) -> Self:
        return replace(self, **{name: value[keep] for name, value in self._tensors()})

    def __add__(self, other: Self) -> Self:
        if not len(self):
            return other
        theirs = dict(other._tensors())
        return replace(self, **{name: torch.cat([value, theirs[name]]) for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, value) for name, value in pairs if isinstance(value, Tensor)]
