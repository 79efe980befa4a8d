"""DDN against a plain loop, and against the distance of a linear classifier's boundary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contracts.nets import Counting, Linear, Noisy, Recording, Small, decided, images, near_boundary, safe
from torch import Tensor, nn

from lit_adv.attacks import DDN
from lit_adv.losses import Combined
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
FAR, EIGHT_BITS = ThreatModel("l2", "inf"), ThreatModel("l2", "inf", levels=255)


def plain(
    model: nn.Module, x0: Tensor, y: int, steps: int, gamma: float, levels: int | None, target: int | None
) -> Any:
    """Algorithm 1 on one image (C, H, W): the images asked about, and which were adversarial."""
    delta, radius = torch.zeros_like(x0), 1.0
    worst = float(torch.stack([x0, 1 - x0]).amax(0).norm())
    seen, won = [], []
    for k in range(steps):
        x = (x0 + delta).requires_grad_()
        logits = model(x.unsqueeze(0))
        label = torch.tensor([y if target is None else target])
        loss = torch.nn.functional.cross_entropy(logits, label)
        (gradient,) = torch.autograd.grad(loss if target is None else -loss, x)
        wins = int(logits.argmax()) != y if target is None else int(logits.argmax()) == target
        seen.append(x.detach())
        won.append(wins)
        delta = delta + (0.01 + 0.99 * (1 + math.cos(math.pi * k / steps)) / 2) * gradient / gradient.norm()
        radius = min(radius * (1 - gamma if wins else 1 + gamma), worst)
        x = (x0 + radius * delta / delta.norm()).clamp(0, 1)
        if levels is not None:
            x = (x * levels).round() / levels
        delta = x - x0
    return seen, won


@pytest.mark.parametrize("levels", [None, 255])
@pytest.mark.parametrize("aim", [None, 1])
@pytest.mark.parametrize("gamma", [0.05, 0.3])
def test_it_is_algorithm_1_on_one_image(levels: int | None, aim: int | None, gamma: float) -> None:
    inner, x = Small(scale=4.0), images(1, 7)
    x = x if levels is None else (x * levels).round() / levels
    y = decided(inner, x)
    target = None if aim is None else (y + aim) % 4
    model = Recording(inner)
    result = DDN(ThreatModel("l2", "inf", levels=levels), 20, gamma)(model, x, y, target)
    seen, won = plain(inner, x[0], int(y), 20, gamma, levels, None if target is None else int(target))
    assert len(model.given) == 20
    assert any(won)
    for found, image in zip(model.given, seen, strict=True):
        torch.testing.assert_close(found[0], image, rtol=0, atol=1e-9)
    nearest = min(float((image - x[0]).norm()) for image, wins in zip(seen, won, strict=True) if wins)
    assert float(result.distance) == pytest.approx(nearest)
    assert result.first_hit.tolist() == [won.index(True) + 1]


@pytest.mark.parametrize("box", [(0.0, 1.0), (-1.0, 2.0)])
def test_the_nearest_image_of_a_linear_classifier(box: tuple[float, float]) -> None:
    model, x, y, distance = near_boundary(5, "l2")
    for dtype in (torch.float64, torch.float32):
        result = DDN(ThreatModel("l2", "inf", box), 100)(model.to(dtype), x.to(dtype), y)
        assert result.success.all()
        assert (result.distance >= distance * (1 - 1e-5)).all()
        assert float(result.distance.median()) < 1.03 * distance
        assert result.queries.tolist() == [100] * 5


def test_a_finite_radius() -> None:
    model, x, y, distance = near_boundary(5, "l2")
    wide = DDN(ThreatModel("l2", 1.25 * distance), 100)
    result = wide(model, x, y)
    assert result.success.all()
    assert torch.equal(result.first_hit, result.queries)  # it ends at the first
    wide.stop_at_hit = False
    assert float(wide(model, x, y).distance.median()) < float(result.distance.median())
    narrow = DDN(ThreatModel("l2", 0.95 * distance), 100)(model, x, y)
    assert not narrow.success.any()
    assert (narrow.distance < 1.05 * distance).all()


def test_what_it_returns_survives_an_8_bit_file() -> None:
    model, x = Small(scale=4.0), images(6, 7)
    x = (x * 255).round() / 255
    y = decided(model, x)
    result = DDN(EIGHT_BITS, 60)(model, x, y)
    assert result.success.all()
    saved = (result.x_adv * 255).round().to(torch.uint8)
    assert torch.equal(saved.double() / 255, result.x_adv)
    exact = DDN(FAR, 60)(model, x, y)
    assert float(result.distance.median()) < 1.05 * float(exact.distance.median())


def test_the_sphere_grows_no_farther_than_the_farthest_corner() -> None:
    inner, x, y = safe()
    with torch.no_grad():
        inner.bias[0] = 90.0  # out of reach, and yet with a slope
    model = Recording(inner)
    result = DDN(FAR, 100, 0.2)(model, x, y)
    assert not result.success.any()
    corner = torch.maximum(x, 1 - x)
    last = (model.given[-1] - x).flatten(1).norm(dim=1)
    assert (last <= corner.flatten(1).norm(dim=1) * (1 + 1e-9)).all()
    assert (last > 0.7 * corner.flatten(1).norm(dim=1)).all()
    assert (result.queries - result.checks).tolist() == [100] * 3
    assert result.checks.tolist() == [1] * 3  # its last image
    assert (result.distance == torch.inf).all()


class Guarded(nn.Module):
    """A linear classifier and a last column that wins where a linear detector's margin is positive."""

    def __init__(self, inner: Linear, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.inner, self.weight, self.bias, self.reject = inner, weight, bias, len(inner.weight)

    def suspicion(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight + self.bias

    def forward(self, x: Tensor) -> Tensor:
        scores = self.inner(x)
        return torch.cat([scores, (scores.amax(1) + self.suspicion(x)).unsqueeze(1)], 1)


@pytest.mark.parametrize("loss", [None, Combined(1.0), Combined(10.0)])
def test_a_detector_is_evaded_too(loss: Combined | None) -> None:
    inner, x, y, _ = near_boundary(5, "l2")
    w = (inner.weight[1] - inner.weight[0]).detach()
    v = 0.5 * w + 3 * (images(1, 31).flatten() - 0.5)  # going for the other class alone raises suspicion
    model = Guarded(inner, v, float(-0.1 - (x.flatten(1) @ v).amax()))
    attack = DDN(FAR, 120) if loss is None else DDN(FAR, 120, loss=loss)
    result = attack(model, x, y)
    assert result.success.all()
    assert (decided(inner, result.x_adv) != y).all()
    assert (model.suspicion(result.x_adv) < 0).all()
    assert (model.suspicion(DDN(FAR, 60)(inner, x, y).x_adv) > 0).any()
    model.bias = 300.0
    assert not attack(model, x, y).success.any()


def test_converged_images_leave() -> None:
    model, x = Small(classes=6, scale=6.0).eval(), images(12)
    y = decided(model, x)
    whole = DDN(steps=60)(model, x, y)
    assert torch.equal(DDN(steps=60, patience=60)(model, x, y).x_adv, whole.x_adv)
    early = DDN(steps=60, patience=8)(model, x, y)
    assert early.success.all()
    assert (early.queries < 60).any()
    assert (early.distance < 1.02 * whole.distance).all()
    for row in range(12):  # the last 8 steps brought it no nearer by 0.1 %, all before them did
        found = early.trace[early.trace[:, 0] == row]
        near, at = float("inf"), 0
        for _, _, query, distance in found.tolist():
            if distance < 0.999 * near:
                near, at = distance, int(query)
        assert int(early.queries[row]) in (at + 8, 60)


@pytest.mark.filterwarnings("ignore:DDN. the gradient was exactly 0")
def test_an_image_that_is_not_broken_has_not_converged() -> None:
    model, x, y = safe()
    assert (DDN(steps=20, patience=2)(model.eval(), x, y).queries == 21).all()


def test_what_is_wrong_from_the_start_ends_there() -> None:
    model, x = Small(), images(4, 7)
    result = DDN(FAR, 20)(model, x, (decided(model, x) + 1) % 4)
    assert torch.equal(result.x_adv, x)
    assert result.distance.tolist() == [0] * 4
    assert result.queries.tolist() == [1] * 4


class Stairs(nn.Module):
    """A linear classifier behind a rounding that lets no gradient through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((4 * x).round() / 4)


def test_without_a_gradient_it_goes_at_random_on_the_sphere() -> None:
    inner, x, y, _ = near_boundary(3, "l2")
    model = Recording(Stairs(inner))
    attack = DDN(FAR, 5, seed=3)
    with pytest.warns(UserWarning, match="exactly 0"):
        attack(model, x, y)
    way = [given.detach() - x for given in model.given]
    assert not way[0].any()
    lengths = way[1].flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1.05))  # far inside the box
    cosine = torch.corrcoef(way[1].flatten(1)) - torch.eye(3)
    assert float(cosine.abs().max()) < 0.3  # each row draws its own
    again = DDN(FAR, 5, seed=4).perturb(Stairs(inner), x, y, index=torch.arange(3))
    assert again.isfinite().all()


def test_tiny_gradients_are_followed() -> None:
    """A sure network's cross-entropy has slopes below 1e-12, which point the right way all the same."""
    model, x, y, distance = near_boundary(3, "l2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 20  # margin 80
    result = DDN(FAR, 100)(model, x, y)
    assert result.success.all()
    assert float(result.distance.median()) < 1.03 * distance
    single = DDN(FAR, 100)(model.float(), x.float(), y)
    assert float(single.distance.median()) < 1.03 * distance


def test_training_gets_the_nearest_of_its_own_images() -> None:
    model, x = Small(scale=4.0), images(6, 7)
    y = decided(model, x)
    attack = DDN(FAR, 60)
    found = attack.perturb(model, x, y)
    torch.testing.assert_close(found, attack(model, x, y).x_adv, rtol=0, atol=1e-9)
    small = attack.with_threat(ThreatModel("l2", 0.1))
    assert small.threat.within(small.perturb(model, x, y), x).all()


@pytest.mark.parametrize("eot", [None, 5])
def test_a_random_model(eot: int | None) -> None:
    inner, x, y, distance = near_boundary(3, "l2")
    attack = DDN(FAR, 40, eot=eot)
    result = attack(Noisy(inner, 3, 0.01), x, y)
    assert result.success.all()
    assert (result.queries - result.checks).tolist() == [40 * (eot or 20)] * 3
    assert (result.distance < 1.3 * distance).all()
    counting = Counting(Noisy(inner, 3, 0.0), x)
    assert int(attack(QueryOracle(counting, 3, budget=99), x, y).queries.max()) <= 99


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"threat": ThreatModel("linf", 0.1)}, "l2"),
        ({"threat": 0.3}, "ThreatModel"),
        ({"patience": 0}, "patience must be a whole number of at least 1, got 0"),
        ({"steps": 0}, "steps"),
        ({"gamma": 1.0}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"initial": 0.0}, "initial"),
        ({"step_size": -1.0}, "step_size"),
        ({"eot": 0}, "eot"),
    ],
)
def test_bad_arguments(named: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DDN(**named)
