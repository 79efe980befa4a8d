"""Measures against counting by hand, brute force and scipy."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from lit_adv.metrics import (
    Records,
    iterations_curve,
    mcnemar,
    queries_curve,
    summarize,
    wilson,
    worst_case,
)
from lit_adv.metrics.summary import (
    claimed_success_rate,
    clean_accuracy,
    common,
    robust_accuracy,
    rounded_success_rate,
    success_over_all,
    success_rate,
)

ROW: dict[str, Any] = {
    "index": 0,
    "label": 1,
    "target": -1,
    "clean_correct": True,
    "claimed": False,
    "verified": False,
    "verified_any": False,
    "verified_mean": 0.0,
    "rounded": False,
    "distance": math.inf,
    "l2": 0.5,
    "linf": 0.1,
    "queries": 100,
    "checks": 1,
    "first_hit": -1,
    "iterations": 10,
}
HIT = {"claimed": True, "verified": True, "verified_any": True, "verified_mean": 1.0, "rounded": True, "distance": 0.1}


def table(*rows: dict[str, Any]) -> Records:
    return Records.from_rows([{**ROW, "index": i, **row} for i, row in enumerate(rows)])


def random_records(seed: int, n: int = 40) -> Records:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for u in torch.rand(n, 4, generator=g).tolist():
        hit, right = u[0] < 0.5, u[1] < 0.8
        spent = 1 + int(u[2] * 30)
        row = {"clean_correct": right, "queries": spent if right else 0, "iterations": int(u[3] * 9) if right else 0}
        rows.append({**row, **HIT, "first_hit": spent} if hit and right else row)
    return table(*rows)


@pytest.fixture
def eight() -> Records:
    """Eight images: two wrong at first, one claim that fails, one lost by rounding, two plain hits, two robust."""
    return table(
        {"clean_correct": False, "queries": 0, "verified": True, "claimed": True},  # wrong at first, whatever it says
        {"clean_correct": False, "queries": 0},
        {"claimed": True, "verified_any": True, "verified_mean": 0.25, "first_hit": 50},
        {**HIT, "rounded": False, "queries": 10, "first_hit": 10, "iterations": 1, "l2": 1.0, "linf": 0.2},
        {**HIT, "queries": 20, "first_hit": 20, "iterations": 2, "l2": 2.0, "linf": 0.1},
        {**HIT, "queries": 60, "first_hit": 40, "iterations": 0, "l2": 3.0, "linf": 0.3},
        {},
        {},
    )


def test_rates_by_hand(eight: Records) -> None:
    assert clean_accuracy(eight) == 6 / 8
    assert robust_accuracy(eight) == 3 / 8
    assert success_over_all(eight) == 5 / 8
    assert success_rate(eight) == pytest.approx(3 / 6)
    assert claimed_success_rate(eight) == pytest.approx(4 / 6)
    assert rounded_success_rate(eight) == pytest.approx(2 / 6)


def test_summary_by_hand(eight: Records) -> None:
    found = summarize(eight)
    assert (found.images, found.wrong_at_first, found.attacked, found.successes) == (8, 2, 6, 3)
    assert found.robust_interval == wilson(3, 8)
    assert found.success_interval == wilson(3, 6)
    assert found.any_success_rate == pytest.approx(4 / 6)
    assert found.mean_success_rate == pytest.approx(3.25 / 6)
    assert (found.mean_queries, found.median_queries) == (30, 20)
    assert found.query_quantiles == {"0.25": 15.0, "0.5": 20.0, "0.75": 40.0, "0.9": 52.0, "1": 60.0}
    assert found.mean_first_hit == pytest.approx(70 / 3)
    assert (found.mean_iterations, found.median_iterations) == (1, 1)
    assert (found.mean_l2, found.mean_linf, found.mean_distance) == pytest.approx((2, 0.2, 0.1))
    assert (found.median_l2, found.median_linf) == pytest.approx((2, 0.2))
    assert (found.mean_checks, found.total_queries, found.immediate) == (1, 390, 1)
    # attacked: queries 100, 10, 20, 60, 100, 100 and norms with 0.5, 0.5, 0.5 and 0.1, 0.1, 0.1 of the failures
    assert (found.mean_queries_of_attacked, found.mean_checks_of_attacked) == (65, 1)
    assert (found.mean_l2_of_attacked, found.mean_linf_of_attacked) == pytest.approx((1.25, 0.15))
    json.dumps(found.as_dict(), allow_nan=False)


def test_undefined_is_none() -> None:
    nothing = summarize(Records.empty())
    assert {value for value in nothing.as_dict().values() if value is not None} == {0}
    wrong = summarize(table({"clean_correct": False}, {"clean_correct": False}))
    assert (wrong.clean_accuracy, wrong.robust_accuracy, wrong.success_over_all) == (0, 0, 1)
    assert wrong.robust_interval is not None
    for name in ("success_rate", "claimed_success_rate", "rounded_success_rate", "success_interval", "mean_queries"):
        assert getattr(wrong, name) is None
    robust = summarize(table({}))
    assert (robust.success_rate, robust.mean_queries, robust.mean_l2) == (0, None, None)
    assert (robust.mean_queries_of_attacked, robust.mean_l2_of_attacked) == (100, 0.5)
    assert wrong.mean_queries_of_attacked is wrong.mean_l2_of_attacked is None


@pytest.mark.parametrize("n", [1, 2, 17, 500])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_agrees_with_scipy(n: int, confidence: float) -> None:
    for k in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
        found = wilson(k, n, confidence)
        assert found is not None
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_checks_its_input() -> None:
    assert wilson(0, 0) is None
    with pytest.raises(ValueError, match=r"k must lie in \[0, n = 3\], got 4"):
        wilson(4, 3)
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got 95"):
        wilson(1, 3, 95)


@pytest.mark.parametrize("seed", range(3))
def test_curves_by_brute_force(seed: int) -> None:
    records = random_records(seed)
    rows = [row for row in records.rows() if row["clean_correct"]]
    for (x, y), key, spent in (
        (queries_curve(records), "first_hit", "queries"),
        (iterations_curve(records), "iterations", "iterations"),
    ):
        assert x[0] == 0
        assert x[-1] == max(row[spent] for row in rows)
        assert (x.diff() > 0).all()
        for point, share in zip(x.tolist(), y.tolist(), strict=True):
            reached = sum(row["verified"] and row[key] <= point for row in rows)
            assert share == pytest.approx(reached / len(rows))
        assert y[-1] == pytest.approx(success_rate(records))


def test_curves_of_nothing() -> None:
    for records in (Records.empty(), table({"clean_correct": False})):
        assert [len(part) for part in queries_curve(records) + iterations_curve(records)] == [0] * 4
    x, y = queries_curve(table({}))
    assert (x.tolist(), y.tolist()) == ([0, 100], [0, 0])


def test_a_success_without_a_first_hit_counts_at_its_full_price() -> None:
    x, y = queries_curve(table({**HIT, "queries": 7, "first_hit": -1}))
    assert (x.tolist(), y.tolist()) == ([0, 7], [0, 1])


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 5), (3, 9), (12, 12)])
def test_mcnemar_by_definition(b: int, c: int) -> None:
    first = table(*[HIT] * b, *[{}] * c, *[HIT] * 2, {}, {"clean_correct": False})
    second = table(*[{}] * b, *[HIT] * c, *[HIT] * 2, {}, HIT)
    found = mcnemar(first, second)
    assert (found.b, found.c, found.n) == (b, c, b + c + 3)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert found.p == pytest.approx(min(1, 2 * tail))
    if b + c:
        assert found.p == pytest.approx(binomtest(b, b + c, 0.5).pvalue)


def test_mcnemar_pairs_by_index() -> None:
    first = Records.from_rows([{**ROW, **HIT, "index": i} for i in (9, 4, 1)])
    second = Records.from_rows([{**ROW, "index": i} for i in (1, 2, 9)])
    found = mcnemar(first, second)
    assert (found.b, found.c, found.n, found.p) == (2, 0, 2, 0.5)
    assert mcnemar(first, Records.empty()).p is None


def test_common_images() -> None:
    parts = common([random_records(0, 9), random_records(1, 6)[torch.tensor([5, 2, 0])]])
    assert [part.index.tolist() for part in parts] == [[0, 2, 5], [0, 2, 5]]
    assert common([]) == []


def test_worst_case_by_brute_force() -> None:
    parts = [random_records(seed, 30) for seed in range(3)]
    worst = worst_case(parts)
    for i, row in enumerate(worst.rows()):
        seen = [part.rows()[i] for part in parts]
        assert row["clean_correct"] == all(each["clean_correct"] for each in seen)
        assert row["verified"] == any(each["verified"] for each in seen)
        assert row["verified_mean"] == max(each["verified_mean"] for each in seen)
        assert row["queries"] == min(each["queries"] for each in seen if each["verified"] == row["verified"])
    for order in itertools.permutations(parts):
        assert worst_case(order).pack().equal(worst.pack())


def test_worst_case_takes_one_row_whole() -> None:
    lost = table({**HIT, "rounded": False, "distance": 0.1, "l2": 1.0})
    kept = table({**HIT, "distance": 0.3, "l2": 3.0})
    near = table({**HIT, "distance": 0.2, "l2": 2.0})
    assert worst_case([lost, kept, near]).l2.tolist() == [2.0]
    assert worst_case([kept]).l2.tolist() == [3.0]
    assert len(worst_case([])) == 0
