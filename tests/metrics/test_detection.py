"""Areas under the ROC curve by comparing all pairs, intervals, rates, and each pair once over processes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_adv.metrics.detection import PairedAuc, auc, auc_interval, share_above, threshold_at


def by_pairs(clean: Tensor, adversarial: Tensor) -> float:
    """P(adversarial > clean) + P(equal) / 2, counted."""
    wins = 0.0
    for a in adversarial.tolist():
        for c in clean.tolist():
            wins += 1.0 if a > c else 0.5 if a == c else 0.0
    return wins / (len(clean) * len(adversarial))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (7, 4), (40, 60)])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_the_area_is_the_share_of_pairs_in_order(n: int, m: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(n * levels)
    clean = torch.randint(levels, (n,), generator=generator).float()
    adversarial = torch.randint(levels, (m,), generator=generator).float() + levels // 4
    assert auc(clean, adversarial) == pytest.approx(by_pairs(clean, adversarial), abs=1e-6)


def test_only_the_order_counts() -> None:
    clean, adversarial = torch.randn(30, dtype=torch.float64), torch.randn(40, dtype=torch.float64) + 0.7
    expected = by_pairs(clean, adversarial)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda s: 1e-200 * s,
        lambda s: 1e9 + s,
        lambda s: s**3,
        lambda s: s.exp(),
        lambda s: s.sign() * (20 * s.abs()).expm1(),
    ]
    for change in changes:
        assert auc(change(clean), change(adversarial)) == pytest.approx(expected, abs=1e-6)
    assert auc(adversarial, clean) == pytest.approx(1 - expected, abs=1e-6)
    saturated = auc((100 * clean).float().sigmoid(), (100 * adversarial).float().sigmoid())
    assert saturated != pytest.approx(expected, abs=1e-3)  # why margins are ranked, not probabilities


def test_the_ends_of_the_line_are_scores_too() -> None:
    inf = torch.inf
    assert auc(torch.tensor([-inf, 0.0]), torch.tensor([inf, inf])) == 1
    assert auc(torch.tensor([-inf, 0.0]), torch.tensor([-inf])) == pytest.approx(0.25)
    assert auc(torch.full((3,), 7.0), torch.full((2,), 7.0)) == 0.5


def test_what_has_no_area_is_refused() -> None:
    some, none = torch.rand(3), torch.zeros(0)
    with pytest.raises(ValueError, match="there are no clean scores"):
        auc(none, some)
    with pytest.raises(ValueError, match="there are no adversarial scores"):
        auc(some, none)
    with pytest.raises(ValueError, match="1 of 2 adversarial scores are NaN"):
        auc(some, torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="2 of 2 clean scores are NaN"):
        auc_interval(torch.full((2,), math.nan), some)


def test_an_interval_is_that_of_resampled_pairs() -> None:
    """Percentiles of areas counted pair by pair, over the same resamples."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.randint(6, (12,), generator=generator).float()
    adversarial = clean + torch.randint(-1, 4, (12,), generator=generator)
    found = auc_interval(clean, adversarial, samples=60, level=0.9, seed=3)
    draw = np.random.default_rng(3)
    areas = []
    for _ in range(60):
        rows = torch.from_numpy(draw.integers(0, 12, 12))
        areas.append(by_pairs(clean[rows], adversarial[rows]))
    low, high = np.quantile(areas, [0.05, 0.95])
    assert found.value == pytest.approx(by_pairs(clean, adversarial), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert str(found) == f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def test_an_unpaired_interval_draws_the_two_apart() -> None:
    clean, adversarial = torch.arange(9.0), torch.arange(14.0) - 2
    found = auc_interval(clean, adversarial, samples=40, seed=1, paired=False)
    draw = np.random.default_rng(1)
    areas = []
    for _ in range(40):
        first, second = draw.integers(0, 9, 9), draw.integers(0, 14, 14)
        areas.append(by_pairs(clean[torch.from_numpy(first)], adversarial[torch.from_numpy(second)]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-9)


def test_intervals_hold_the_truth_about_as_often_as_they_say_and_shrink() -> None:
    """Normal scores a distance 1 apart have area Phi(1 / sqrt 2)."""
    truth = 0.5 * (1 + math.erf(0.5))
    generator = torch.Generator().manual_seed(6)
    held = 0
    for _ in range(60):
        clean, adversarial = (torch.randn(80, generator=generator) + shift for shift in (0, 1))
        found = auc_interval(clean, adversarial, samples=200, paired=False)
        assert found.low <= found.value <= found.high
        held += found.low <= truth <= found.high
    assert held >= 51
    few, many = (
        auc_interval(torch.randn(n, generator=generator), torch.randn(n, generator=generator) + 1, 200)
        for n in (50, 5000)
    )
    assert many.high - many.low < (few.high - few.low) / 4
    perfect = auc_interval(torch.arange(5.0), torch.arange(5.0) + 10, 50)
    assert tuple(perfect) == pytest.approx((1, 0.05 ** (1 / 5), 1))


def test_an_area_at_its_end_has_a_bound_that_knows_how_many_pairs_there_are() -> None:
    """Resampled, what is in order stays so: the bound is where that is seen in one of twenty samples."""
    low, high = torch.arange(40.0), torch.arange(40.0) + 100
    first, last = auc_interval(low, high, 20), auc_interval(high, low, 20, level=0.9)
    assert (first.value, first.high) == (1, 1)
    assert first.low**40 == pytest.approx(0.05)
    assert (last.value, last.low) == (0, 0)
    assert (1 - last.high) ** 40 == pytest.approx(0.1)
    assert auc_interval(low, high[:9], 20, paired=False).low ** 9 == pytest.approx(0.05)
    tied = auc_interval(torch.zeros(6), torch.tensor([0.0, *[1.0] * 5]), 200)
    assert tied.low < tied.value < 1  # 33 of 36 pairs: not at the end


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_intervals_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"samples must be at least 1 and level in \(0, 1\)"):
        auc_interval(torch.rand(3), torch.rand(3), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pairs need as many clean as adversarial scores, got 3, 4"):
        auc_interval(torch.rand(3), torch.rand(4))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("levels", [3, 10**6])
def test_a_threshold_is_the_least_score_that_keeps_to_the_false_alarms(share: float, levels: int) -> None:
    scores = torch.randint(levels, (200,), generator=torch.Generator().manual_seed(7)).float()
    found = threshold_at(scores, share)
    fits = [score for score in scores.tolist() if sum(other > score for other in scores.tolist()) <= share * 200]
    assert found == min(fits)
    assert share_above(scores, found) <= share
    assert share_above(scores, found) == sum(score > found for score in scores.tolist()) / 200


def test_rates_count_strictly_and_refuse_nonsense() -> None:
    scores = torch.tensor([-1.0, 0.0, 0.0, 2.0])
    assert share_above(scores, 0) == 0.25
    assert threshold_at(scores, 0) == 2
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"false_alarms must lie in \[0, 1\)"):
            threshold_at(scores, share)
    with pytest.raises(ValueError, match="there are no scores scores"):
        share_above(scores[:0], 0)


def test_pairs_seen_twice_count_once() -> None:
    """In batches, in any order, with the repetitions of a distributed sampler."""
    clean, adversarial = torch.randn(11), torch.randn(11) + 0.5
    order = [*range(11), 0, 4, 4]
    random.Random(8).shuffle(order)
    metric = PairedAuc()
    for part in (order[:6], order[6:7], order[7:]):
        metric.update(clean[part], adversarial[part], torch.tensor(part))
    assert float(metric.compute()) == pytest.approx(by_pairs(clean, adversarial), abs=1e-6)
    metric.reset()
    metric.update(torch.zeros(1), torch.ones(1), torch.tensor([0]))
    assert float(metric.compute()) == 1
