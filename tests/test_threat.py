"""ThreatModel: projections against brute force, steps, rounding, errors."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lit_adv.threat import NORMS, Norm, ThreatModel

RADII = {"linf": 0.1, "l2": 0.7, "l1": 1.5, "l0": 5}


def pair(count: int = 6, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0 = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    x = x0 + spread * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), x0.to(dtype)


@pytest.mark.parametrize(("eps", "radius"), [("8/255", 8 / 255), (0.3, 0.3), ("0.3", 0.3), ("inf", math.inf), (0, 0.0)])
def test_radius_is_read_from_numbers_and_fractions(eps: float | str, radius: float) -> None:
    assert ThreatModel("linf", eps).radius == radius


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"norm": "l3"}, "norm"),
        ({"eps": -0.1}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"eps": "nan"}, "eps"),
        ({"eps": "8/0"}, "eps"),
        ({"eps": "eight"}, "eps"),
        ({"eps": "8/255/2"}, "eps"),
        ({"box": (1.0, 0.0)}, "box"),
        ({"box": (0.5, 0.5)}, "box"),
        ({"levels": 0}, "levels"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ThreatModel(**arguments)  # type: ignore[arg-type]


def test_frozen_and_equal_by_value() -> None:
    assert ThreatModel("l2", "1/2") == ThreatModel("l2", "1/2")
    with pytest.raises(AttributeError):
        ThreatModel().eps = 1.0  # type: ignore[misc]


def test_distances_agree_with_numpy() -> None:
    x, x0 = pair()
    x[:, 0] = x0[:, 0]
    delta = (x - x0).flatten(1).numpy()
    for norm, order in (("linf", np.inf), ("l2", 2), ("l1", 1), ("l0", 0)):
        expected = [np.linalg.norm(row, order) for row in delta]
        np.testing.assert_allclose(ThreatModel(norm, 1).distance(x, x0).numpy(), expected, rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", NORMS)
def test_nan_is_far_away(norm: str) -> None:
    x, x0 = pair(2)
    x = x0.clone()
    x[0, 0, 0, 0] = math.nan
    threat = ThreatModel(norm, "inf")  # type: ignore[arg-type]
    assert threat.within(x, x0).tolist() == [False, True]
    if norm != "l0":  # a count of changed values is finite
        assert threat.distance(x, x0)[0] == math.inf


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feasible_points_are_unmoved_bit_for_bit(norm: str, dtype: torch.dtype) -> None:
    x, x0 = pair(50, dtype=dtype)
    threat = ThreatModel(norm, RADII[norm])  # type: ignore[arg-type]
    inside = threat.project(x0 + 0.9 * (threat.project(x, x0) - x0), x0) if norm != "l0" else threat.project(x, x0)
    assert torch.equal(threat.project(inside, x0), inside)
    assert torch.equal(threat.project(x0, x0), x0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_is_idempotent_and_lands_in_ball_and_box(norm: str, dtype: torch.dtype) -> None:
    x, x0 = pair(50, dtype=dtype)
    threat = ThreatModel(norm, RADII[norm])  # type: ignore[arg-type]
    once = threat.project(x, x0)
    assert threat.within(once, x0).all()
    assert once.min() >= 0
    assert once.max() <= 1
    torch.testing.assert_close(threat.project(once, x0), once, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        *[("linf", eps) for eps in ("1/255", "2/255", "4/255", 0.015, "8/255", 0.3, 0.001)],
        *[("l2", eps) for eps in (0.5, 0.05, 0.005)],
        *[("l1", eps) for eps in (10.0, 1.0, 0.1)],
    ],
)
def test_projected_points_are_within_the_ball(norm: str, eps: float | str) -> None:
    """Also in float32, on images with values on no grid: else every win on the boundary would be thrown away."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(50, 3, 16, 16, generator=generator, dtype=torch.float64).float()
    signs = torch.randn(x0.shape, generator=generator).sign()
    threat = ThreatModel(norm, eps)  # type: ignore[arg-type]
    x = threat.project(x0 + signs * max(threat.radius, 0.1), x0)
    assert threat.within(x, x0).all()
    assert (threat.distance(x.double(), x0.double()) <= threat.radius + 1e-6).all() or norm != "linf"


def test_points_clearly_outside_are_not_within() -> None:
    x0 = torch.full((1, 1, 2, 2), 0.5)
    for norm, step in (("linf", 0.01), ("l2", 0.01 / 2), ("l1", 0.01 / 4)):
        threat = ThreatModel(norm, 0.01)  # type: ignore[arg-type]
        assert threat.within(x0 + step, x0).all()
        assert not threat.within(x0 + 1.001 * step, x0).any()
    assert not ThreatModel("linf", 1.0).within(torch.full((1, 1, 2, 2), 1.001), x0).any()


@pytest.mark.parametrize("norm", NORMS)
def test_samples_are_projected_as_single_images(norm: str) -> None:
    x, x0 = pair(6)
    threat = ThreatModel(norm, RADII[norm])  # type: ignore[arg-type]
    many = torch.stack([x, x.flip(0), x0], 1)
    single = torch.stack([threat.project(many[:, s], x0) for s in range(3)], 1)
    assert torch.equal(threat.project(many, x0), single)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_ball_projections_agree_with_a_solver(norm: str) -> None:
    """The nearest point of the ball, found by minimising the distance under the constraint (box out of the way)."""
    rng = np.random.default_rng(0)
    threat = ThreatModel(norm, 0.6, box=(-10.0, 10.0))  # type: ignore[arg-type]
    for _ in range(4):
        delta = rng.normal(size=5)
        x = torch.tensor(delta).view(1, 1, 1, 5)
        ours = threat.project(x, torch.zeros_like(x)).flatten().numpy()
        if norm == "l2":
            expected = delta * min(1, 0.6 / np.linalg.norm(delta))
        else:  # split into positive and negative parts: smooth
            constraint = {"type": "ineq", "fun": lambda v: 0.6 - v.sum()}
            found = minimize(
                lambda v, d=delta: ((v[:5] - v[5:] - d) ** 2).sum(),
                np.full(10, 0.05),
                bounds=[(0, None)] * 10,
                constraints=[constraint],
                options={"ftol": 1e-14, "maxiter": 500},
            )
            expected = found.x[:5] - found.x[5:]
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_l0_projection_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(1)
    threat = ThreatModel("l0", 2, box=(-10.0, 10.0))
    for _ in range(10):
        delta = rng.normal(size=6)
        best = min(combinations(range(6), 2), key=lambda kept: sum(delta[i] ** 2 for i in range(6) if i not in kept))
        expected = np.where(np.isin(np.arange(6), best), delta, 0)
        x = torch.tensor(delta).view(1, 1, 2, 3)
        assert np.array_equal(threat.project(x, torch.zeros_like(x)).flatten().numpy(), expected)


def test_linf_projection_agrees_with_numpy() -> None:
    x, x0 = pair(20)
    expected = np.clip(np.clip(x.numpy(), x0.numpy() - 0.1, x0.numpy() + 0.1), 0, 1)
    np.testing.assert_allclose(ThreatModel("linf", 0.1).project(x, x0).numpy(), expected, atol=1e-15)


def test_l2_projection_keeps_the_direction() -> None:
    x0 = torch.full((4, 3, 4, 4), 0.5, dtype=torch.float64)
    x = x0 + torch.randn(x0.shape, dtype=torch.float64)
    moved = ThreatModel("l2", 0.3).project(x, x0) - x0
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(1), (x - x0).flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@pytest.mark.parametrize("norm", NORMS)
def test_radius_zero_and_infinity(norm: str) -> None:
    x, x0 = pair()
    zero, unlimited = ThreatModel(norm, 0), ThreatModel(norm, "inf")  # type: ignore[arg-type]
    assert torch.equal(zero.project(x, x0), x0)
    assert torch.equal(unlimited.project(x, x0), x.clamp(0, 1))
    assert unlimited.within(x.clamp(0, 1), x0).all()
    assert not zero.within(x, x0).any()


@pytest.mark.parametrize("norm", NORMS)
def test_no_images(norm: str) -> None:
    threat, none = ThreatModel(norm, 1), torch.zeros(0, 3, 4, 4)  # type: ignore[arg-type]
    assert threat.project(none, none).shape == none.shape
    assert threat.distance(none, none).shape == (0,)


def test_steepest_maximises_the_inner_product_over_the_unit_ball() -> None:
    gradient = pair()[0] - 0.5
    flat = gradient.flatten(1)
    best = {"linf": flat.abs().sum(1), "l2": flat.norm(dim=1), "l1": flat.abs().amax(1), "l0": flat.abs().amax(1)}
    for norm, expected in best.items():
        step = ThreatModel(norm, 1).steepest(gradient)  # type: ignore[arg-type]
        torch.testing.assert_close((step * gradient).flatten(1).sum(1), expected)
        if norm != "l0":
            length = ThreatModel(norm, 1).distance(step, torch.zeros_like(step))  # type: ignore[arg-type]
            torch.testing.assert_close(length, torch.ones_like(length))


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_of_nothing_is_nothing(norm: str) -> None:
    threat = ThreatModel(norm, 1)  # type: ignore[arg-type]
    for size in (1, 7, 64):
        zero, nan = torch.zeros(3, 1, 1, size), torch.full((3, 1, 1, size), math.nan)
        assert torch.equal(threat.steepest(zero), zero)
        assert torch.equal(threat.steepest(nan), zero)


def test_steepest_of_tiny_and_huge_gradients() -> None:
    gradient = pair(dtype=torch.float32)[0] - 0.5
    threat = ThreatModel("l2", 1)
    for scale in (1e-38, 1e-30, 1e30):
        torch.testing.assert_close(threat.steepest(gradient * scale), threat.steepest(gradient), rtol=1e-3, atol=1e-4)


def test_one_bad_value_spoils_no_other() -> None:
    gradient = torch.ones(1, 1, 2, 2)
    gradient[0, 0, 0, 0] = math.nan
    for norm in ("linf", "l2"):
        step = ThreatModel(norm, 1).steepest(gradient)  # type: ignore[arg-type]
        assert step[0, 0, 0, 0] == 0
        assert (step.flatten()[1:] > 0).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", "8/255"), ("linf", "1/255"), ("linf", 0.015), ("l2", 0.5)])
def test_quantize_lands_on_the_grid_inside_the_ball(norm: str, eps: float | str) -> None:
    """For 8-bit images, as they come from files."""
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randint(0, 256, (40, 3, 8, 8), generator=generator).float() / 255
    threat = ThreatModel(norm, eps, levels=255)  # type: ignore[arg-type]
    x = threat.project(x0 + torch.randn(x0.shape, generator=generator), x0)
    rounded = threat.quantize(x, x0)
    assert ((rounded * 255 - (rounded * 255).round()).abs() < 1e-4).all()
    assert threat.within(rounded, x0).all()
    if norm == "linf":  # never further than a level from what was asked for, and the extremes stay extreme
        assert ((rounded - x).abs() < 1 / 255).all()
        whole = math.floor(threat.radius * 255 + 1e-6)
        steps = ((rounded - x0) * 255).round().abs().amax()
        assert steps == whole
    assert torch.equal(threat.quantize(x0, x0), x0)


def test_quantize_falls_back_to_the_clean_images_own_level() -> None:
    """10.7 lies 0.3 from level 11 and 0.7 from level 10: no level is within 0.2, and 11 is the nearest."""
    threat = ThreatModel("linf", 0.2 / 255, levels=255)
    x0 = torch.full((1, 1, 1, 1), 10.7 / 255, dtype=torch.float64)
    for shift in (-0.15, 0.0, 0.1, 0.15):
        assert float(threat.quantize(x0 + shift / 255, x0) * 255) == pytest.approx(11)


def test_quantize_without_a_limit_rounds_to_the_nearest() -> None:
    x, x0 = pair()
    rounded = ThreatModel("l2", "inf").quantize(x, x0, levels=15)
    torch.testing.assert_close(rounded, (x * 15).round() / 15)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_on_its_way_outside_the_ball_is_rounded_and_left_there(norm: Norm) -> None:
    threat = ThreatModel(norm, 0.1, levels=255)
    x0 = torch.full((2, 1, 4, 4), 100 / 255, dtype=torch.float64)
    inside, outside = x0 + 0.02, x0 + 0.15
    x = torch.stack([inside[0], outside[0]])
    found = threat.quantize(x, x0)
    torch.testing.assert_close(found[1], (outside[0] * 255).round() / 255)
    assert threat.within(found[:1], x0[:1]).all()
    both = threat.quantize(torch.stack([x, x], 1), x0)  # (n, s, C, H, W)
    torch.testing.assert_close(both[:, 1], found)


def test_levels_must_meet_the_box() -> None:
    ThreatModel("linf", 0.1, (-1.0, 1.0), levels=255)
    with pytest.raises(ValueError, match=r"levels must divide the box, .* 1 / 255, got \(0, 0.5\)"):
        ThreatModel("linf", 0.1, (0, 0.5), levels=255)
