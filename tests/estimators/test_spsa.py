"""SPSA: its directions, its formula, and what its mean is."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Recording, images, near_boundary, safe
from torch import Tensor

from lit_adv.attacks import PGD
from lit_adv.draws import Draws
from lit_adv.estimators import SPSA
from lit_adv.losses import margin
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
SHAPE = (1, 2, 5)
BOX = (0.0, 1.0)
WEIGHT = torch.linspace(-2, 3, 10, dtype=torch.float64).view(SHAPE)


def plane(x: Tensor) -> Tensor:
    return (x * WEIGHT).flatten(-3).sum(-1) + 17


def crooked(x: Tensor) -> Tensor:
    return (x**3 - x.flip(-1) * x).flatten(-3).sum(-1)


def middle(count: int) -> Tensor:
    return 0.3 + 0.4 * images(count, shape=SHAPE)


def estimate(estimator: SPSA, x: Tensor, f: object = crooked) -> Tensor:
    draws = Draws(0, torch.arange(len(x)) + 7, torch.zeros(len(x), dtype=torch.int64))
    value, gradient, memory = estimator(f, x, estimator.init(x), draws, BOX)  # type: ignore[arg-type]
    torch.testing.assert_close(value, f(x))  # type: ignore[operator]
    assert memory.shape == (len(x), 0)
    return gradient


def asked(estimator: SPSA, x: Tensor) -> Tensor:
    """Directions of the pairs asked about, (n, pairs, C, H, W), and nothing moved but along them."""
    probes: list[Tensor] = []

    def noted(z: Tensor) -> Tensor:
        if z.dim() == 5:
            probes.append(z)
        return crooked(z)

    estimate(estimator, x, noted)
    both = torch.cat(probes, 1)
    up, down = (both[:, 0::2] - x.unsqueeze(1)) / estimator.delta, (x.unsqueeze(1) - both[:, 1::2]) / estimator.delta
    torch.testing.assert_close(up, down)
    return up


@pytest.mark.parametrize(
    ("direction", "spread"), [("gaussian", "multiply"), ("signs", "multiply"), ("signs", "divide")]
)
def test_a_linear_function_has_its_gradient_in_the_mean(direction: str, spread: str) -> None:
    estimator = SPSA(20_000, 0.05, direction, spread, "none", block=20_000)  # type: ignore[arg-type]
    gradient = estimate(estimator, middle(3), plane)
    torch.testing.assert_close(gradient, WEIGHT.expand_as(gradient), rtol=0, atol=0.2)  # 5 standard errors


def test_directions_have_unit_length_or_are_signs() -> None:
    length = asked(SPSA(6, clip="none", block=4), middle(3)).flatten(2).norm(dim=2)
    torch.testing.assert_close(length, torch.ones_like(length))
    signs = asked(SPSA(300, direction="signs", clip="none"), middle(3))
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    assert signs.mean().abs() < 0.05
    assert (signs[0] != signs[1]).any()


@pytest.mark.parametrize("direction", ["gaussian", "signs"])
def test_one_direction_is_the_slope_over_the_direction(direction: str) -> None:
    """Equation (2.2) of Spall: the same difference for every coordinate, over that coordinate's step."""
    x = middle(4)
    estimator = SPSA(1, 0.02, direction, clip="none")  # type: ignore[arg-type]
    r = asked(estimator, x)[:, 0]
    slope = (crooked(x + 0.02 * r) - crooked(x - 0.02 * r)) / 0.04
    torch.testing.assert_close(estimate(estimator, x), slope[:, None, None, None] / r, rtol=1e-6, atol=1e-8)


def test_dividing_and_multiplying_have_one_sign() -> None:
    x = middle(4)
    divided, multiplied = (estimate(SPSA(spread=spread), x) for spread in ("divide", "multiply"))
    assert torch.equal(divided.sign(), multiplied.sign())
    assert divided.sign().abs().all()


@pytest.mark.parametrize("spread", ["divide", "multiply"])
def test_several_directions_are_averaged(spread: str) -> None:
    x = middle(3)
    r = asked(SPSA(7, 0.02, spread=spread, clip="none"), x)  # type: ignore[arg-type]
    slope = (crooked(x.unsqueeze(1) + 0.02 * r) - crooked(x.unsqueeze(1) - 0.02 * r)) / 0.04
    each = slope[..., None, None, None] * (1 / r if spread == "divide" else 10 * r)
    for block in (2, 4, 6, 64):
        gradient = estimate(SPSA(7, 0.02, spread=spread, clip="none", block=block), x)  # type: ignore[arg-type]
        torch.testing.assert_close(gradient, each.mean(1), rtol=1e-6, atol=1e-7)


def test_a_flat_function_has_no_gradient_at_all() -> None:
    assert not estimate(SPSA(5), middle(3), lambda x: x.flatten(-3).sum(-1) * 0 + 3).any()


def test_probes_are_cut_to_the_box_and_the_divisor_stays() -> None:
    """The slope of a plane at white images: half of each pair is cut off, which halves what is left."""
    x = torch.ones(2, *SHAPE, dtype=torch.float64)
    free, cut = (estimate(SPSA(9, clip=clip), x, plane) for clip in ("none", "box"))
    torch.testing.assert_close(cut, free / 2)
    model, _, y = safe()
    recording, x = Recording(model), torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    PGD(ThreatModel("linf", 0.1), 3, 0.02, False, estimator=SPSA(3, 0.3))(QueryOracle(recording, 1), x, y[:1])
    assert torch.cat(recording.given).min() == 0


@pytest.mark.parametrize(("directions", "block"), [(1, 64), (3, 64), (5, 4)])
def test_a_step_costs_two_queries_a_direction_and_the_image_beside_them(directions: int, block: int) -> None:
    inner, x, y = safe()
    model = Counting(inner, x)
    attack = PGD(ThreatModel("linf", 0.01), 4, 0.01, False, estimator=SPSA(directions, block=block))
    result = attack(QueryOracle(model, len(x), known_right=True), x, y)
    assert torch.equal(result.queries, model.seen)
    assert (result.queries - result.checks).tolist() == [4 * 2 * directions] * len(x)
    assert result.checks.tolist() == [4 + 1] * len(x)


@pytest.mark.parametrize("direction", ["gaussian", "signs"])
def test_the_linear_yardstick(direction: str) -> None:
    model, x, y, distance = near_boundary(2, "linf")
    for factor, wins in ((1.25, True), (0.95, False)):
        threat = ThreatModel("linf", factor * distance)
        attack = PGD(
            threat,
            150,
            0.03 * distance,
            False,
            loss=margin,
            estimator=SPSA(48, 0.001, direction, "multiply"),  # type: ignore[arg-type]
        )
        assert attack(model, x, y).success.tolist() == [wins] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 0}, "directions must be at least 1, got 0"),
        ({"delta": 0.0}, "delta must be > 0"),
        ({"delta": float("nan")}, "delta must be > 0"),
        ({"direction": "north"}, "direction must be one of gaussian, signs, got 'north'"),
        ({"spread": "add"}, "spread must be one of divide, multiply"),
        ({"clip": "sphere"}, "clip must be one of none, box, ball"),
        ({"block": 1}, "block must hold a pair"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPSA(**settings)  # type: ignore[arg-type]
