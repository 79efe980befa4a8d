"""NES: the estimate against what is known of it, and the query-limited attack against a loop in plain numbers."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Small, decided, images, safe
from torch import Tensor, nn

from lit_adv.attacks import PGD
from lit_adv.draws import Draws
from lit_adv.estimators import NES
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
SHAPE = (1, 2, 5)
BOX = (0.0, 1.0)


def draws(count: int, step: int = 0) -> Draws:
    return Draws(0, torch.arange(count) + 7, torch.full((count,), step))


def middle(count: int) -> Tensor:
    return 0.3 + 0.4 * images(count, shape=SHAPE)


def estimate(estimator: NES, f: nn.Module, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return estimator(f, x, estimator.init(x) if memory is None else memory, draws(len(x)), BOX)


class Plane(nn.Module):
    """A linear function of each image."""

    weight = torch.linspace(-2, 3, 10, dtype=torch.float64).view(SHAPE)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).flatten(-3).sum(-1) + 17


class Cubes(nn.Module):
    """Something crooked."""

    def forward(self, x: Tensor) -> Tensor:
        return (x**3 - x.flip(-1) * x).flatten(-3).sum(-1)


def test_a_linear_function_has_its_gradient_at_its_scale() -> None:
    x = middle(3)
    value, gradient, memory = estimate(NES(40_000, 0.05, block=20_000), Plane(), x)
    torch.testing.assert_close(value, Plane()(x))
    torch.testing.assert_close(gradient, Plane.weight.expand_as(x), rtol=0.0, atol=0.15)  # 5 standard errors
    assert memory.shape == (3, 0)


@pytest.mark.parametrize("block", [2, 6, 64])
def test_pairs_cancel_on_an_even_function(block: int) -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x - 0.5) ** 2).flatten(-3).sum(-1).cos()

    x = torch.full((2, *SHAPE), 0.5, dtype=torch.float64)
    assert estimate(NES(20, 0.25, block=block), Even(), x)[1].abs().max() < 1e-14


def test_a_flat_function_has_no_gradient_at_all() -> None:
    flat = nn.Flatten(-3)
    _, gradient, _ = estimate(NES(20, block=6), nn.Sequential(flat, Zero()), middle(2))
    assert not gradient.any()


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1) * 0 + 3


@pytest.mark.parametrize("block", [2, 4, 6, 7, 18])
def test_blocks_of_any_size_give_one_estimate(block: int) -> None:
    whole, parts = (estimate(NES(20, 0.01, block=size), Cubes(), middle(3))[1] for size in (64, block))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


def test_the_estimate_is_the_formula() -> None:
    x = middle(2)
    _, gradient, _ = estimate(NES(8, 0.02, block=64), Cubes(), x)
    u = draws(2).normal(4, *SHAPE, first=torch.zeros(2, dtype=torch.int64), dtype=torch.float64)
    expected = torch.zeros_like(x)
    for row in range(2):
        for j in range(4):
            rise = Cubes()(x[row] + 0.02 * u[row, j]) - Cubes()(x[row] - 0.02 * u[row, j])
            expected[row] += rise * u[row, j] / (8 * 0.02)
    torch.testing.assert_close(gradient, expected)


def test_momentum_is_a_moving_average_that_begins_at_zero() -> None:
    x, plain, heavy = middle(2), NES(8, 0.02), NES(8, 0.02, 0.9)
    memory, expected = heavy.init(x), torch.zeros_like(x)
    for step in range(3):
        _, fresh, _ = plain(Cubes(), x, plain.init(x), draws(2, step), BOX)
        _, gradient, memory = heavy(Cubes(), x, memory, draws(2, step), BOX)
        expected = 0.9 * expected + 0.1 * fresh
        torch.testing.assert_close(gradient, expected)


def test_clipping_moves_the_probes_and_keeps_the_divisor() -> None:
    """At a white pixel one side of each pair is cut off: half the slope remains."""
    x = torch.ones(1, *SHAPE, dtype=torch.float64)
    _, free, _ = estimate(NES(4000, 0.01, block=4000), Plane(), x)
    _, cut, _ = estimate(NES(4000, 0.01, clip="box", block=4000), Plane(), x)
    torch.testing.assert_close(cut, free / 2)  # w min(u, 0) + w max(u, 0) = w u over the same 2 sigma


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_query_limited_attack_is_a_plain_loop(norm: str) -> None:
    """Ascent of the cross-entropy with momentum; the step size is halved where 3 losses have not risen."""
    threat = ThreatModel(norm, {"linf": 0.03, "l2": 0.2}[norm])  # type: ignore[arg-type]
    length, steps = {"linf": 0.05, "l2": 0.3}[norm], 25
    model, x0 = Small(), images(4)
    y = decided(model, x0)

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            return -model(x).log_softmax(-1).gather(1, y[:, None]).squeeze(1)

    x, g, rate = x0, torch.zeros_like(x0), torch.full((4,), length, dtype=torch.float64)
    seen: list[list[float]] = [[], [], [], []]
    halved = 0
    for step in range(steps):
        u = Draws(0, torch.arange(4), torch.full((4,), step)).normal(
            5, *x0.shape[1:], first=torch.zeros(4, dtype=torch.int64), dtype=torch.float64
        )
        fresh = sum(
            (loss(x + 0.01 * u[:, j]) - loss(x - 0.01 * u[:, j]))[:, None, None, None] * u[:, j] for j in range(5)
        )
        g = 0.9 * g + 0.1 * fresh / (10 * 0.01)
        for row, value in enumerate(loss(x).tolist()):
            seen[row] = [*seen[row], value][-3:]
            if len(seen[row]) == 3 and seen[row][2] <= seen[row][0]:
                rate[row], seen[row], halved = max(float(rate[row]) / 2, 0.004), [], halved + 1
        if norm == "linf":
            x = torch.clamp(x + rate[:, None, None, None] * g.sign(), x0 - threat.radius, x0 + threat.radius)
        else:
            x = x + (rate / g.flatten(1).norm(dim=1))[:, None, None, None] * g
            delta = x - x0
            size = delta.flatten(1).norm(dim=1)[:, None, None, None]
            x = x0 + delta * (threat.radius / size).clamp_max(1)
        x = x.clamp(0, 1)
    assert halved > 2
    attack = PGD(
        threat, steps, length, False, estimator=NES(10, 0.01, 0.9, block=4), plateau=3, min_step_size=0.004,
        stop_at_hit=False,
    )  # fmt: skip
    result = attack.perturb(model, x0, y, index=torch.arange(4))
    torch.testing.assert_close(result, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("samples", "block"), [(50, 64), (50, 16), (600, 32), (2, 2)])
def test_an_estimate_costs_its_probes_and_the_image_beside_them(samples: int, block: int) -> None:
    inner, x, y = safe()
    model = Counting(inner, x)
    attack = PGD(ThreatModel("linf", 0.01), 3, 0.01, False, estimator=NES(samples, block=block))
    result = attack(QueryOracle(model, len(x), known_right=True), x, y)
    assert torch.equal(result.queries, model.seen)
    assert (result.queries - result.checks).tolist() == [3 * samples] * len(x)
    assert result.checks.tolist() == [3 + 1] * len(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 3}, "samples must be an even number of at least 2"),
        ({"samples": 0}, "samples must be an even number of at least 2"),
        ({"sigma": 0.0}, "sigma must be > 0"),
        ({"sigma": float("nan")}, "sigma must be > 0"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"momentum": -0.1}, "momentum must lie in"),
        ({"clip": "sphere"}, "clip must be none, box or ball"),
        ({"block": 1}, "block >= 2"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NES(**settings)  # type: ignore[arg-type]
