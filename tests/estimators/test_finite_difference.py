"""Finite differences over the three bases, against linear functions, plain loops and textbook linear algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contracts.nets import Linear, Small, images
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.estimators import Coordinates, FiniteDifference, PrincipalComponents, RandomGroups
from lit_adv.estimators.finite_difference import Basis, principal_components

SHAPE = (3, 8, 8)
SIZE = 192


def draws(count: int, step: int = 0) -> Draws:
    return Draws(0, torch.arange(count), torch.full((count,), step))


def linear(seed: int = 3) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A linear function of an image, and its gradient."""
    weight = images(1, seed, SHAPE)[0] - 0.5
    return weight, lambda x: 2.0 + (x * weight).flatten(-3).sum(-1)


def estimate(estimator: FiniteDifference, f: Callable[[Tensor], Tensor], x: Tensor, step: int = 0) -> Tensor:
    return estimator(f, x, estimator.init(x), draws(len(x), step), (0.0, 1.0))[1]


def groups_of(basis: Basis, x: Tensor, step: int = 0) -> list[list[set[int]]]:
    """The sets of each row."""
    count = basis.count(x.shape[1:])
    told = basis.choose(x, draws(len(x), step), torch.arange(count).expand(len(x), -1))
    return [[{int(i) for i in group if i >= 0} for group in row] for row in told]


def fitted(components: int, count: int = 300, seed: int = 5) -> PrincipalComponents:
    basis = PrincipalComponents(components)
    basis.fit(images(count, seed, SHAPE))
    return basis


# exact on a linear function


@pytest.mark.parametrize("delta", [1e-3, 0.5, 40.0])
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("block", [2, 10, 64, 1000])
def test_coordinates_give_the_gradient_of_a_linear_function_for_any_delta(
    delta: float, two_sided: bool, block: int
) -> None:
    weight, f = linear()
    x = images(3)
    estimator = FiniteDifference(delta=delta, two_sided=two_sided, clip="none", block=block)
    assert estimator.probes(x.shape[1:]) == (2 if two_sided else 1) * SIZE
    assert estimator.cost(x.shape[1:]) == estimator.probes(x.shape[1:]) + 1
    torch.testing.assert_close(estimate(estimator, f, x), weight.expand(3, -1, -1, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("rounding", ["ceil", "floor"])
@pytest.mark.parametrize("size", [1, 5, 8, 64, 191, 192, 500])
@pytest.mark.parametrize("block", [6, 64])
def test_groups_give_the_sums_over_their_sets(two_sided: bool, rounding: Any, size: int, block: int) -> None:
    weight, f = linear()
    x = images(3)
    basis = RandomGroups(size, rounding)
    ours = estimate(FiniteDifference(basis, 0.3, two_sided, "none", block=block), f, x).flatten(1)
    for row, sets in enumerate(groups_of(basis, x)):
        expected = torch.zeros(SIZE, dtype=torch.float64)
        for members in sets:
            place = list(members)
            expected[place] = weight.flatten()[place].sum()
        torch.testing.assert_close(ours[row], expected)


@pytest.mark.parametrize("count", [1, 7, SIZE])
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("block", [4, 64])
def test_components_give_the_projection_of_the_gradient(count: int, two_sided: bool, block: int) -> None:
    weight, f = linear()
    x = images(3)
    basis = fitted(count)
    rows = basis.choose(x, draws(3), torch.arange(count).expand(3, -1))
    out = x.new_zeros(3, count, *SHAPE)
    basis.shift(torch.zeros_like(x), rows, 1.0, out)
    matrix = out[0].flatten(1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(count, dtype=torch.float64), atol=1e-10, rtol=0)
    expected = (matrix.T @ (matrix @ weight.flatten())).view(SHAPE)
    ours = estimate(FiniteDifference(basis, 0.2, two_sided, "none", block=block), f, x)
    torch.testing.assert_close(ours, expected.expand(3, -1, -1, -1))
    if count == SIZE:
        torch.testing.assert_close(ours[0], weight)


def test_a_smooth_function_has_its_autograd_gradient() -> None:
    model, x = Small(), images(4)
    leaf = x.clone().requires_grad_()
    (true,) = torch.autograd.grad((model(leaf)[:, 1] - model(leaf)[:, 0]).sum(), leaf)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            scores = model(x.flatten(0, -4)).view(*x.shape[:-3], -1)
        return scores[..., 1] - scores[..., 0]

    ours = estimate(FiniteDifference(delta=1e-5, clip="none"), f, x)
    torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-8)
    assert torch.equal(ours.sign(), true.sign())


# groups


@pytest.mark.parametrize(
    ("elements", "size", "ceil", "floor"),
    [(784, 8, 98, 98), (3072, 8, 384, 384), (784, 7, 112, 112), (784, 35, 23, 22), (784, 350, 3, 2), (784, 1000, 1, 1)],
)
def test_numbers_of_groups_are_those_of_the_paper(elements: int, size: int, ceil: int, floor: int) -> None:
    shape = torch.Size((1, 1, elements))
    assert RandomGroups(size).count(shape) == ceil
    assert RandomGroups(size, "floor").count(shape) == floor


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
@pytest.mark.parametrize("size", [1, 3, 8, 35, 191, 192, 1000])
def test_groups_are_disjoint_cover_everything_and_have_their_size(rounding: Any, size: int) -> None:
    basis, x = RandomGroups(size, rounding), images(4)
    for sets in groups_of(basis, x):
        assert set().union(*sets) == set(range(SIZE))
        assert sum(map(len, sets)) == SIZE
        assert all(len(members) == min(size, SIZE) for members in sets[:-1])
        rest = SIZE - size * (len(sets) - 1)
        assert len(sets[-1]) == rest
        assert rest <= size if rounding == "ceil" else size <= rest < 2 * size or len(sets) == 1


def test_groups_are_new_for_every_image_and_estimate() -> None:
    basis, x = RandomGroups(8), images(3)
    first, second = groups_of(basis, x), groups_of(basis, x, step=1)
    assert first == groups_of(basis, x)
    assert first[0] != first[1]
    assert first[0] != second[0]
    alone = groups_of(basis, x[:1])
    assert alone[0] == first[0]


def test_groups_of_one_are_the_coordinates() -> None:
    _, f = linear()
    x = images(3)

    def bent(x: Tensor) -> Tensor:
        return f(x) ** 2

    ours, theirs = (estimate(FiniteDifference(basis, 0.01), bent, x) for basis in (RandomGroups(1), Coordinates()))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# clipping


def test_clipped_elements_count_half_and_exact_lengths_whole() -> None:
    weight, f = linear()
    x = images(3) * 0.5 + 0.25
    x[0], x[1, 0] = 0.0, 1.0
    edge = (x == 0) | (x == 1)
    halves = torch.where(edge, 0.5 * weight, weight)
    torch.testing.assert_close(estimate(FiniteDifference(delta=0.1), f, x), halves)
    torch.testing.assert_close(
        estimate(FiniteDifference(delta=0.1, exact_length=True), f, x), weight.expand(3, -1, -1, -1)
    )


@pytest.mark.parametrize("two_sided", [True, False])
def test_exact_lengths_are_what_is_left_along_the_direction(two_sided: bool) -> None:
    """Against a plain loop over directions: the difference, over the share of the direction between the probes."""
    _, f = linear()
    x = images(2)
    x[:, 0], x[:, 1] = 0.0, 0.95
    bases: list[Basis] = [RandomGroups(10), fitted(9)]
    for basis in bases:
        ours = estimate(FiniteDifference(basis, 0.1, two_sided, "box", True), f, x)
        count = basis.count(x.shape[1:])
        told = basis.choose(x, draws(2), torch.arange(count).expand(2, -1))
        directions = x.new_zeros(2, count, *SHAPE)
        basis.shift(torch.zeros_like(x), told, 1.0, directions)
        for row in range(2):
            expected = torch.zeros(SHAPE, dtype=torch.float64)
            for v in directions[row]:
                plus = (x[row] + 0.1 * v).clamp(0, 1)
                minus = (x[row] - 0.1 * v).clamp(0, 1) if two_sided else x[row]
                length = float(((plus - minus) * v).sum() / (v * v).sum())
                slope = float(f(plus) - f(minus)) / length if length else 0.0
                expected += slope * v
            torch.testing.assert_close(ours[row], expected)


def test_probes_stay_in_the_box_unless_said_otherwise() -> None:
    x = images(2)
    for clip, inside in (("box", True), ("ball", True), ("none", False)):
        seen: list[Tensor] = []

        def f(probes: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(probes.clone())
            return probes.flatten(-3).sum(-1)

        estimate(FiniteDifference(delta=1.0, clip=clip), f, x)  # type: ignore[arg-type]
        low, high = (min(float(p.min()) for p in seen), max(float(p.max()) for p in seen))
        assert (low >= 0 and high <= 1) is inside


# bad values


def test_what_is_not_known_counts_as_no_difference() -> None:
    weight, f = linear()
    x = images(2)
    calls: list[None] = []

    def broken(x: Tensor) -> Tensor:
        values = f(x)
        if x.dim() == 5:
            values = values.clone()
            values[:, 2] = (math.nan, math.inf, -math.inf)[len(calls) % 3]
            calls.append(None)
        return values

    block = 16
    ours = estimate(FiniteDifference(delta=0.1, clip="none", block=block), broken, x).flatten(1)
    lost = torch.zeros(SIZE, dtype=torch.bool)
    lost[1 :: block // 2] = True
    assert (ours[:, lost] == 0).all()
    torch.testing.assert_close(ours[:, ~lost], weight.flatten()[~lost].expand(2, -1))


def test_a_constant_function_has_the_zero_estimate() -> None:
    x = images(2)
    bases: list[Basis] = [Coordinates(), RandomGroups(8), fitted(5)]
    for basis in bases:
        ours = estimate(FiniteDifference(basis, 0.1), lambda x: 3.0 + 0 * x.flatten(-3).sum(-1), x)
        assert torch.equal(ours, torch.zeros_like(x))


def test_differences_of_values_are_taken_in_float64() -> None:
    """Values that float32 tells apart keep all of their difference."""
    x = images(1, shape=(1, 1, 1), dtype=torch.float32)
    first, second = torch.tensor(16777216.0), torch.tensor(-16777215.0)

    def f(x: Tensor) -> Tensor:
        return first.expand(1) if x.dim() == 4 else torch.stack([first, second])[None]

    ours = estimate(FiniteDifference(delta=0.5, clip="none"), f, x)
    assert float(ours) == pytest.approx(33554431.0, abs=2.0)


# principal components


def test_elements_that_never_vary_have_no_part_in_any_component() -> None:
    x = images(300, 7)
    x[:, :, :2], x[:, 2, :, 7] = 0.0, 0.3
    constant = torch.zeros(SHAPE, dtype=torch.bool)
    constant[:, :2], constant[2, :, 7] = True, True
    basis = PrincipalComponents(20)
    basis.fit(x)
    _, f = linear()
    ours = estimate(FiniteDifference(basis, 0.1), f, images(3))
    assert (ours[:, constant] == 0).all()
    assert (ours[:, ~constant] != 0).all()
    full = int((~constant).sum())
    principal_components(x, full)
    with pytest.raises(ValueError, match=f"at most the rank of the training images, {full}, got {full + 1}"):
        principal_components(x, full + 1)


def test_the_file_is_read_again_and_made_anew_for_other_images(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "fitted.safetensors"
    first = PrincipalComponents(6)
    assert first.needs_fit
    assert first.fitted_on == ""
    first.fit(images(50, 1), path)
    assert not first.needs_fit
    written = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    again = PrincipalComponents(6)
    again.fit(images(50, 1), str(path))
    assert path.stat().st_mtime_ns == stamp
    read = PrincipalComponents(6, path)
    fewer = PrincipalComponents(4, path)
    x = images(2)
    _, f = linear()
    results = [estimate(FiniteDifference(basis, 0.1), f, x) for basis in (first, again, read)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert fewer.count(x.shape[1:]) == 4
    assert first.fitted_on == again.fitted_on == read.fitted_on
    other = PrincipalComponents(6)
    other.fit(images(50, 2), path)
    assert other.fitted_on != first.fitted_on
    assert path.read_bytes() != written
    path.write_bytes(written[:100])
    mended = PrincipalComponents(6)
    mended.fit(images(50, 2), path)
    assert mended.fitted_on == other.fitted_on == PrincipalComponents(6, path).fitted_on
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_cosine_with_the_gradient_grows_with_the_components() -> None:
    weight, f = linear()
    x = images(1)
    cosines = []
    for count in (1, 5, 20, 80, SIZE):
        ours = estimate(FiniteDifference(fitted(count), 0.1, clip="none"), f, x)[0]
        cosines.append(float((ours * weight).sum() / (ours.norm() * weight.norm())))
    assert np.all(np.diff(cosines) > -1e-12)
    assert cosines[-1] == pytest.approx(1.0)


def test_rows_do_not_see_one_another() -> None:
    model, x = Small(), images(6)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x.flatten(0, -4)).view(*x.shape[:-3], -1)[..., 1]

    bases: list[Basis] = [Coordinates(), RandomGroups(7), fitted(9)]
    for basis in bases:
        estimator = FiniteDifference(basis, 0.01, block=10)
        whole = estimate(estimator, f, x)
        for i in range(6):
            one = Draws(0, torch.tensor([i]), torch.zeros(1, dtype=torch.int64))
            alone = estimator(f, x[i : i + 1], x[:1, :0, 0, 0], one, (0.0, 1.0))[1]
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-9, atol=1e-12)


# what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteDifference(delta=0.0), "delta must be > 0"),
        (lambda: FiniteDifference(delta=-0.1), "delta must be > 0"),
        (lambda: FiniteDifference(delta=math.nan), "delta must be > 0"),
        (lambda: FiniteDifference(delta=math.inf), "delta must be > 0 in pixel units and finite"),
        (lambda: FiniteDifference(clip="cube"), "clip must be none, box or ball"),  # type: ignore[arg-type]
        (lambda: FiniteDifference(block=1), "block >= 2"),
        (lambda: FiniteDifference(basis=8), "basis must be Coordinates"),  # type: ignore[arg-type]
        (lambda: RandomGroups(0), "size must be at least 1"),
        (lambda: RandomGroups(8, "round"), "rounding ceil or floor"),  # type: ignore[arg-type]
        (lambda: PrincipalComponents(0), "components must be at least 1"),
        (lambda: PrincipalComponents(3, Path("nowhere.safetensors")), "path must be a safetensors file.*nowhere"),
        (lambda: PrincipalComponents(3).fit(images(0)), "images to learn from"),
        (lambda: PrincipalComponents(3).fit(images(5).flatten(1)), "images to learn from"),
        (lambda: PrincipalComponents(3).fit(images(5) / 0 * 0), "finite"),
        (lambda: fitted(3).count(torch.Size((3, 8, 9))), r"images \(3, 8, 8\), but the images under attack are"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_has_learnt_nothing_says_so() -> None:
    x = images(2)
    estimator = FiniteDifference(PrincipalComponents(3))
    assert estimator.needs_fit
    with pytest.raises(ValueError, match=r"call attack.fit\(images, labels\)"):
        estimate(estimator, lambda x: x.flatten(-3).sum(-1), x)
    estimator.fit(images(20), torch.zeros(20, dtype=torch.int64))
    assert not estimator.needs_fit
    assert estimate(estimator, lambda x: x.flatten(-3).sum(-1), x).any()


def test_a_linear_classifier_is_read_exactly() -> None:
    """The margin against a fixed rival: W_rival - W_y, whatever the delta."""
    model, x = Linear(3), images(2)
    weight = (model.weight[2] - model.weight[0]).detach().view(SHAPE)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            scores = model(x.flatten(0, -4)).view(*x.shape[:-3], -1)
        return scores[..., 2] - scores[..., 0]

    for delta in (1e-3, 1.0):
        ours = estimate(FiniteDifference(delta=delta, clip="none"), f, x)
        torch.testing.assert_close(ours, weight.expand(2, -1, -1, -1), rtol=1e-7, atol=1e-7)
