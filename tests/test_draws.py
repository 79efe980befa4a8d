"""Draws: distributions, independence, and numbers that depend on seed, image, step and key alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lit_adv.draws import Draws

MANY = 400


def draws(rows: int = MANY, seed: int = 0, step: int = 0, key: int = 0, begin: int = 0) -> Draws:
    index = torch.arange(begin, begin + rows)
    return Draws(seed, index, torch.full_like(index, step), key)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.flatten().double().numpy(), b.flatten().double().numpy())[0, 1])


def unrelated(a: Tensor, b: Tensor) -> bool:
    """No correlation of values, magnitudes or squares beyond 4.5 standard errors."""
    bound = 4.5 / math.sqrt(a.numel())
    pairs = [(a, b), (a.abs(), b.abs()), (a**2, b), (a, b**2)]
    return all(abs(correlation(*pair)) < bound for pair in pairs)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40, 2**63])
def test_normal_numbers_are_normal(seed: int) -> None:
    z = draws(seed=seed).normal(5, 101).flatten().double().numpy()
    count = len(z)
    assert abs(z.mean()) < 4.5 / math.sqrt(count)
    assert abs(z.var() - 1) < 4.5 * math.sqrt(2 / count)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert abs(stats.skew(z)) < 0.03
    assert abs(stats.kurtosis(z)) < 0.06
    assert np.abs(z).max() > 4


def test_uniform_numbers_are_uniform_and_inside_their_ends() -> None:
    u = draws().uniform(5, 100, low=-2.0, high=3.0).flatten().double().numpy()
    assert -2 < u.min() < -1.999
    assert 2.999 < u.max() < 3
    assert stats.kstest(u, "uniform", args=(-2, 5)).pvalue > 1e-4


@pytest.mark.parametrize("high", [1, 2, 3, 10, 1000])
def test_integers_are_uniform(high: int) -> None:
    numbers = draws().integers(high, 100).flatten()
    assert numbers.dtype == torch.int64
    assert numbers.min() == 0
    assert numbers.max() == high - 1
    if high > 1:
        assert stats.chisquare(numbers.bincount(minlength=high).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", ["normal", "uniform"])
@pytest.mark.parametrize("other", [{"begin": 1}, {"step": 1}, {"step": -1}, {"key": 1}, {"key": -1}, {"seed": 1}])
def test_neighbouring_streams_are_unrelated(name: str, other: dict[str, int]) -> None:
    shape = (5, 100)
    a, b = getattr(draws(), name)(*shape), getattr(draws(**other), name)(*shape)
    centre = 0.5 if name == "uniform" else 0.0
    assert unrelated(a - centre, b - centre)
    if "begin" in other:  # row i + 1 of one is row i of the other
        assert torch.equal(a[1:], b[:-1])
    else:
        assert not (a == b).any(1).any(1).all()


def test_numbers_within_a_row_are_unrelated() -> None:
    z = draws().normal(6, 100)
    assert unrelated(z[:, :-1], z[:, 1:])  # neighbouring samples
    for lag in (1, 2, 7, 50):  # places, also the two halves of a pair
        assert unrelated(z[..., :-lag], z[..., lag:])


def test_calls_are_unrelated() -> None:
    source = draws()
    first, second, third = source.normal(5, 100), source.normal(5, 100), source.uniform(5, 100)
    assert unrelated(first, second)
    assert unrelated(first, third - 0.5)


def test_sums_over_rows_have_the_right_spread() -> None:
    """Hidden dependence between rows would show in the variance of sums across them."""
    z = draws(rows=1000).normal(200)
    sums = z.double().sum(0) / math.sqrt(1000)
    assert stats.kstest(sums.numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("name", ["normal", "uniform"])
@pytest.mark.parametrize("inner", [(), (1,), (3,), (2, 3, 3)])
def test_blocks_make_up_the_whole(name: str, inner: tuple[int, ...]) -> None:
    whole = getattr(draws(4), name)(10, *inner)
    for sizes in ([10], [1] * 10, [3, 3, 3, 1], [7, 3]):
        source, parts, done = draws(4), [], 0
        for size in sizes:
            parts.append(getattr(source, name)(size, *inner, first=done))
            done += size
        assert torch.equal(torch.cat(parts, 1), whole)


def test_blocks_of_a_later_call_continue_that_call() -> None:
    source, other = draws(4), draws(4)
    source.normal(3, 2)
    whole = source.normal(6, 2)
    other.normal(3, 2)
    assert torch.equal(torch.cat([other.normal(2, 2), other.normal(4, 2, first=2)], 1), whole)


def test_rows_may_stand_at_different_blocks() -> None:
    whole = draws(4).normal(12, 5, first=torch.zeros(4, dtype=torch.int64))
    first = torch.tensor([0, 3, 6, 9])
    ragged = draws(4).normal(3, 5, first=first)
    for row in range(4):
        assert torch.equal(ragged[row], whole[row, first[row] : first[row] + 3])


def test_tensor_first_is_a_stream_of_its_own() -> None:
    zero = torch.zeros(3, dtype=torch.int64)
    fresh, used = draws(3), draws(3)
    before = used.normal(4, 5)
    after = used.normal(4, 5, first=zero)
    assert torch.equal(fresh.normal(4, 5, first=zero), after)
    assert not torch.equal(before, after)


def test_a_row_is_the_same_alone_in_a_batch_and_in_any_order() -> None:
    index, step = torch.tensor([5, 900, 3, 17]), torch.tensor([0, 4, -1, 2**33])
    whole = Draws(7, index, step, 2).normal(3, 4, 4)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(Draws(7, index[order], step[order], 2).normal(3, 4, 4), whole[order])
    assert torch.equal(Draws(7, index, step, 2)[order].normal(3, 4, 4), whole[order])
    for row in range(4):
        assert torch.equal(Draws(7, index[row : row + 1], step[row : row + 1], 2).normal(3, 4, 4)[0], whole[row])


def test_selection_and_later_begin_with_the_first_call() -> None:
    source = draws(4)
    source.normal(3)
    assert torch.equal(source[torch.tensor([1])].normal(3), draws(4).normal(3)[1:2])
    assert torch.equal(source.later(2).normal(3), draws(4, step=2).normal(3))
    assert len(source) == 4


def test_seed_index_step_key_and_call_all_matter() -> None:
    seen = [draws(2, **other).normal(4) for other in ({}, {"seed": 1}, {"step": 1}, {"key": 1}, {"begin": 2})]
    source = draws(2)
    source.normal(4)
    seen.append(source.normal(4))
    assert len({tuple(numbers.flatten().tolist()) for numbers in seen}) == len(seen)


def test_float64_sees_the_same_numbers() -> None:
    assert torch.equal(draws(3).normal(4, dtype=torch.float64), draws(3).normal(4).double())
    assert torch.equal(draws(3).uniform(4, dtype=torch.float64), draws(3).uniform(4).double())


def test_shapes() -> None:
    assert draws(3).normal().shape == (3,)
    assert draws(3).uniform().shape == (3,)
    assert draws(3).normal(2, 3, 4, 5).shape == (3, 2, 3, 4, 5)
    assert draws(0).normal(2, 3).shape == (0, 2, 3)
    assert draws(0).uniform(2).shape == (0, 2)
    assert draws(3).integers(5, 2).shape == (3, 2)
    assert draws(3).normal(0, 2).shape == (3, 0, 2)


def test_tails_are_finite() -> None:
    z = draws(1000).normal(1000)
    assert z.isfinite().all()
    assert 4.5 < z.abs().max() < 6
