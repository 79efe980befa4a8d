"""How rows share the forwards of one call: places that become free, and rows that ask for little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.climb import WIDE, Climb, Ramp, grey, zeros

from lit_adv.attack import Search, State
from lit_adv.oracle import QueryOracle

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")


def test_rows_that_ask_little_make_room_for_more() -> None:
    class Unequal(Climb):
        widest = 0

        def cost(self, shape: torch.Size, state: State | None = None) -> int | torch.Tensor:
            return 4 if state is None else torch.ones_like(state.rows)

        def step(self, search: Search, state: State) -> State:
            self.widest = max(self.widest, len(state))
            return super().step(search, state)

    attack = Unequal([[0.01]] * 40, WIDE)
    attack(QueryOracle(Ramp(), 30, chunk=8), grey(30), zeros(30))
    assert attack.widest == 6  # 8 // 4, one more as long as 4 fit beside the rows' one each, at the end a straggler


def test_places_that_become_free_are_taken_in_the_same_pass() -> None:
    class Watching(Climb):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            self.widths: list[int] = []

        def step(self, search: Search, state: State) -> State:
            self.widths.append(len(state))
            return super().step(search, state)

    attack = Watching([[0.01]], WIDE)  # every row leaves after one step
    attack(QueryOracle(Ramp(), 40, chunk=8), grey(40), zeros(40))
    assert attack.widths == [8] * 5
