"""Attacks made for tests of the loop: one that climbs by given steps, one whose every start draws its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack, Search, State
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel


class Ramp(nn.Module):
    """Class 1 where the mean of the image reaches ``level``; its logits cross there."""

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        gap = self.weight * (x.flatten(1).mean(1) - self.level) * 10
        return torch.stack([-gap, gap], 1)


class Climb(IterativeAttack):
    """Step t asks images ``values[t]`` above the clean one, one or several at once."""

    access = Access.PROBS

    def __init__(
        self,
        values: list[list[float]],
        threat: ThreatModel,
        label: bool = False,
        mask: list[bool] | None = None,
        **settings: object,
    ) -> None:
        self.threat, self.values, self.steps = threat, torch.tensor(values, dtype=torch.float64), len(values)
        self.by_label, self.mask = label, mask
        self.access = Access.LABEL if label else Access.PROBS
        for name, value in settings.items():
            setattr(self, name, value)

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self.values.shape[1]

    def start(self, search: Search, rows: Tensor) -> State:
        return State(**search.fresh(rows))

    def step(self, search: Search, state: State) -> State:
        x = state.x0.unsqueeze(1) + self.values[state.t][:, :, None, None, None]
        asked = None if self.mask is None else torch.tensor(self.mask).expand(len(state), -1)
        (search.label if self.by_label else search.scores)(x, state, asked=asked)
        state.x = x[:, -1]
        return state


def grey(count: int = 1, value: float = 0.3) -> Tensor:
    return torch.full((count, 1, 2, 2), value, dtype=torch.float64)


def zeros(count: int = 1) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


WIDE = ThreatModel("linf", 0.4)


@dataclass(kw_only=True)
class Places(State):
    start: Tensor


class Restarted(IterativeAttack):
    """Every start draws its place; a hit needs a draw beyond 1.5."""

    access = Access.PROBS
    steps, restarts = 3, 6

    def __init__(self, seed: int = 0, **settings: object) -> None:
        self.threat, self.seed = ThreatModel("linf", "inf"), seed
        self.starts: list[tuple[int, float]] = []
        for name, value in settings.items():
            setattr(self, name, value)

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return 1

    def start(self, search: Search, rows: Tensor) -> State:
        place = search.starting_draws(rows).normal(dtype=torch.float64)
        self.starts += list(zip(rows.tolist(), place.tolist(), strict=True))
        return Places(**search.fresh(rows), start=place)

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, Places)
        moved = (state.t >= 1) & (state.start > 1.0)
        state.x = state.x0 + torch.where(moved, 0.3, 0.0).double()[:, None, None, None]
        search.scores(state.x, state)
        return state
