"""What an attack found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

ZERO_GRADIENT, BAD_GRADIENT = "input gradients were exactly 0", "input gradients were not finite"
"""Names under which an attack counts gradients that lead nowhere."""


def broken_by(name: str) -> str:
    """Name under which a cascade counts the images that one of its attacks broke, of those it saw."""
    return f"images broken by {name}"


def added(parts: Iterable[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Add up how often what happened, and of how many times."""
    total: dict[str, tuple[int, int]] = {}
    for part in parts:
        for name, (happened, times) in part.items():
            before = total.get(name, (0, 0))
            total[name] = before[0] + happened, before[1] + times
    return total


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, one row per image.

    Attributes:
        x_adv: (B, C, H, W) the adversarial image found, else the last candidate; always in the box.
        success: (B,) bool: adversarial within the threat model, distance <= radius (1 + 1e-6).
        distance: (B,) of the adversarial image found, inf if none; of an attack that searches the nearest one, also
            where that lies beyond the radius.
        queries: (B,) int64, all images sent to the model on account of this one.
        checks: (B,) int64 of them that a paper's arithmetic leaves out: mean and last checks, confirmations.
        first_hit: (B,) int64, queries spent when it was first adversarial within the threat model, else -1.
            A budget of exactly so many would have found it.
        iterations: (B,) int64, steps completed at the first hit, or in all.
        trace: (m, 4) float64: row, step, queries and distance at each hit kept.
        nonfinite: answers that held NaN and counted as no success.
        counts: how often something worth knowing happened, and of how many times it could have.
    """

    x_adv: Tensor
    success: Tensor
    distance: Tensor
    queries: Tensor
    checks: Tensor
    first_hit: Tensor
    iterations: Tensor
    trace: Tensor
    nonfinite: int = 0
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.success)

    def __getitem__(self, rows: Tensor) -> AttackResult:
        """The results of some rows, by places or by a mask; the trace's rows are renumbered."""
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        place = torch.full((len(self),), -1, dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        trace = self.trace.clone()
        trace[:, 0] = place.to(trace.device)[trace[:, 0].long()].to(trace.dtype)
        whole = ("trace", "nonfinite", "counts")
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in whole}
        trace = trace[trace[:, 0] >= 0]
        return AttackResult(**tensors, trace=trace, nonfinite=self.nonfinite, counts=self.counts)
