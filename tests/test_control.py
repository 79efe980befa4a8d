"""The null control of a random model, against a plain loop over its draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_adv.control import null_control
from lit_adv.defense import Defense
from lit_adv.draws import Draws


class Coin(Defense):
    """Wrong whenever its uniform number falls below ``share``; class 0 is right."""

    stochastic, num_classes = True, 2

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        assert draws is not None
        wrong = (draws.uniform() < self.share).double()
        return torch.stack([1 - wrong, wrong], 1) * 3


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_null_control_against_a_plain_loop(share: float) -> None:
    index, queries, model = torch.tensor([3, 8, 11, 90]), 200, Coin(share)
    x, y = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    found = null_control(model, x, y, index, queries)

    def wrong(place: int, number: int) -> bool:
        draws = Draws(1, index[place : place + 1], torch.tensor([number]), key=-1)
        return bool(model(x[:1], draws).argmax(1))

    for place in range(4):
        first = confirmed = spent = 0
        while spent < queries and not confirmed:
            spent += 1
            if wrong(place, spent - 1):
                first = first or spent
                if spent + 31 <= queries:
                    votes = sum(wrong(place, spent + k) for k in range(31))
                    spent += 31
                    confirmed = spent if votes > 15 else 0
        assert (int(found[0][place]), int(found[1][place])) == (first, confirmed)


def test_null_control_at_both_ends() -> None:
    x, y, index = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), torch.arange(3)
    first, confirmed = null_control(Coin(0.0), x, y, index, 50)
    assert not first.any()
    assert not confirmed.any()
    first, confirmed = null_control(Coin(1.0), x, y, index, 50)
    assert first.tolist() == [1] * 3
    assert confirmed.tolist() == [32] * 3
