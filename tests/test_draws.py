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
    assert 4.2 < z.abs().max() < 4.5


def test_normal_numbers_take_65536_values_with_the_moments_of_the_normal_distribution() -> None:
    values = draws(2000).normal(1000).unique().double()  # type: ignore[no-untyped-call]
    assert len(values) == 2**16
    expected = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16)
    assert (values - expected)[200:-200].abs().max() < 1e-4
    assert torch.equal(values, -values.flip(0))
    assert abs(float(values.square().mean()) - 1) < 1e-7
    assert abs(float(values.pow(4).mean()) - 3) < 1e-3


@pytest.mark.parametrize("name", ["normal", "uniform", "signs"])
@pytest.mark.parametrize("across", ["places", "samples", "rows", "steps", "keys", "seeds", "calls"])
def test_no_two_of_many_streams_are_correlated(name: str, across: str) -> None:
    """All pairs of 60 neighbours, by values and by magnitudes; a hash that is too weak shows in some pair."""
    many = range(60)
    if across == "calls":
        source = draws(30)
        numbers = [getattr(source, name)(10, 40) for _ in many]
    elif across in ("places", "samples", "rows"):
        shape = {"places": (100, 60), "samples": (60, 100), "rows": (100, 100)}[across]
        numbers = list(getattr(draws(60), name)(*shape).unbind({"places": 2, "samples": 1, "rows": 0}[across]))
    else:
        numbers = [getattr(draws(30, **{across[:-1]: number - 3}), name)(10, 40) for number in many]
    flat = torch.stack([number.flatten() for number in numbers]).double()
    for values in (flat, flat.abs()) if name != "signs" else (flat,):
        scores = np.corrcoef(values.numpy())[np.triu_indices(60, 1)] * math.sqrt(flat.shape[1])
        assert np.abs(scores).max() < 5.2
        assert abs(scores.std() - 1) < 0.08


@pytest.mark.parametrize("arranged", ["places", "samples", "rows", "steps"])
def test_bits_are_equally_often_set_and_unrelated(arranged: str) -> None:
    count = 2**16
    unit = {
        "places": lambda: draws(8).uniform(4, count // 32),
        "samples": lambda: draws(1).uniform(count),
        "rows": lambda: draws(count).uniform(),
        "steps": lambda: Draws(0, torch.full((count,), 3), torch.arange(count)).uniform(),
    }[arranged]()
    whole = (unit.flatten().double().numpy() * 2**23 - 0.5).astype(np.int64)
    bits = (whole[:, None] >> np.arange(23) & 1) * 2.0 - 1
    assert np.abs(bits.mean(0)).max() * math.sqrt(count) < 4.5
    for one, other in ((bits, bits), (bits[:-1], bits[1:])):  # within a number, and in the next one
        products = one.T @ other / math.sqrt(count)
        if one is other:
            np.fill_diagonal(products, 0)
        assert np.abs(products).max() < 4.8
    cells = whole[0::2] >> 17 << 6 | whole[1::2] >> 17
    assert stats.chisquare(np.bincount(cells, minlength=4096)).pvalue > 1e-4


def test_two_samples_share_no_more_numbers_than_chance_has_it() -> None:
    z = draws(200).normal(40, 100)
    for one, other in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[..., 50:], z[..., :50])):
        expected = one.numel() / 2**16
        assert abs(int((one == other).sum()) - expected) < 4.5 * math.sqrt(expected)


def test_signs_are_fair_and_continue() -> None:
    signs = draws().signs(5, 100)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4.5 / math.sqrt(signs.numel())
    z = signs[..., :-1] * signs[..., 1:]
    assert abs(float(z.mean())) < 4.5 / math.sqrt(z.numel())
    source = draws()
    assert torch.equal(torch.cat([source.signs(2, 100), source.signs(3, 100, first=2)], 1), signs)
    assert draws(3).signs(4, dtype=torch.float64).dtype == torch.float64
    assert draws(3).signs().shape == (3,)


def test_permutations_are_uniform() -> None:
    orders = draws(24000).permutation(4)
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand(24000, -1))
    counts = (orders * torch.tensor([64, 16, 4, 1])).sum(1).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert draws(0).permutation(4).shape == (0, 4)
    assert draws(2).permutation(1).tolist() == [[0], [0]]


def test_a_permutation_belongs_to_its_row() -> None:
    order = torch.tensor([2, 0, 1])
    source = Draws(1, torch.tensor([4, 9, 6]), torch.tensor([0, 5, 1]))
    assert torch.equal(source[order].permutation(50), source.permutation(50)[order])
    again = draws(2)
    assert not torch.equal(again.permutation(50), again.permutation(50))


def test_numbers_made_in_inference_mode_are_the_same() -> None:
    with torch.inference_mode():
        first = draws(2).normal(3, 77).clone()
    assert torch.equal(draws(2).normal(3, 77), first)
    weight = torch.ones(77, requires_grad=True)
    torch.autograd.grad((draws(2).normal(3, 77) * weight).sum(), weight)


def test_numbers_stay_as_they_are_from_version_to_version() -> None:
    """Recorded results are compared with repeated ones; a change of these numbers is a change of all results."""
    source = Draws(3, torch.tensor([11]), torch.tensor([5]), 2)
    assert source.normal(2, 2).flatten().tolist() == [
        -0.33216965198516846,
        -0.6552395820617676,
        0.2769553065299988,
        1.6797699928283691,
    ]
    assert source.integers(1000, 4).flatten().tolist() == [557, 118, 620, 588]
