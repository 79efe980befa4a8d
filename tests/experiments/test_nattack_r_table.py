"""The table of NAttack-R: its paired comparison, its goal and its rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_adv.experiments.nattack_r_table import HEADS, USUAL, Found, compared, goals, rows
from lit_adv.metrics import Records


def records(hits: dict[int, int]) -> Records:
    """By index the queries to success; -1: unbroken, -2: wrong at first."""
    index = torch.tensor(sorted(hits))
    hit = torch.tensor([hits[i] for i in index.tolist()])
    columns = {name: torch.zeros(len(index)) for name in Records.empty().columns()}
    told = {"index": index, "clean_correct": hit > -2, "verified": hit >= 0, "first_hit": hit}
    return Records(**{**columns, **told})


def test_comparison_is_that_of_plain_loops() -> None:
    ours = records({1: 10, 2: 20, 3: -1, 4: 40, 5: 30, 7: 5})
    usual = records({1: 40, 2: 30, 3: 50, 4: 80, 5: -2, 6: 9, 7: 25})
    pair = compared(ours, usual)
    assert pair is not None
    assert pair.n == 4  # 1, 2, 4 and 7
    assert pair.ratio == pytest.approx((10 + 20 + 40 + 5) / (40 + 30 + 80 + 25))
    assert pair.low <= pair.ratio <= pair.high < 1
    generator = np.random.default_rng(1)
    ratios = []
    for _ in range(4000):
        chosen = generator.integers(4, size=4)
        ratios.append(np.array([10, 20, 40, 5])[chosen].sum() / np.array([40, 30, 80, 25])[chosen].sum())
    assert (pair.low, pair.high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])), abs=0.02)
    assert compared(ours, records({9: 4})) is None
    same = compared(ours, ours)
    assert same is not None
    assert (same.ratio, same.p) == (1, None)


def test_the_goal_is_judged_over_enough_images_that_both_break() -> None:
    usual = Found(USUAL, records({i: 1000 + i for i in range(250)}), 1.0)
    quick = Found("S", records({i: 700 + i for i in range(250)}), 1.0)
    slow = Found("S times 3", records({i: 900 + i for i in range(250)}), None)
    met, missed = goals([quick, slow, usual])
    assert met.startswith("goal, S: mean queries to success lower by 20 % or more; they are -26.7 % (n 250): met")
    assert missed.endswith("they are -8.9 % (n 250): MISSED")
    (few,) = goals([Found("S", records(dict.fromkeys(range(50), 5)), None), usual])
    assert few.endswith("not judged, for fewer than 200 images say little")
    (none,) = goals([Found("S", records(dict.fromkeys(range(50), -1)), None), usual])
    assert none == "goal, S: no image that both starts break"


def test_rows_give_success_over_images_right_at_first_and_the_papers_labelled() -> None:
    found = [
        Found("S", records({1: 10, 2: 30, 3: -1, 4: -2}), None),
        Found(USUAL, records({1: 100, 2: 300, 3: 50, 4: -2}), 8.0),
    ]
    table = rows(found)
    assert all(len(row) == len(HEADS) for row in table)
    assert table[0][:3] == ["S", "3", "66.7 %"]
    assert table[0][4:6] == ["20", "20"]
    assert table[0][9:11] == ["2", "0.100"]
    assert table[1][8] == "2.000"
    assert table[1][9:] == ["", "", "", ""]
    assert len(table) == 5
    assert all(row[0].startswith("paper: ") for row in table[2:])
