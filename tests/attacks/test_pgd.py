"""PGD and its settings against formulas written out, and against the linear classifier's closed form."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.nets import Counting, Linear, Noisy, Small, decided, images, near_boundary
from scipy import stats
from torch import Tensor, nn

from lit_adv.attacks import PGD
from lit_adv.attacks.pgd import random_point
from lit_adv.defense import Defense, straight_through
from lit_adv.draws import Draws
from lit_adv.estimators import Autograd
from lit_adv.losses import margin
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was in training mode"),
    pytest.mark.filterwarnings("ignore:.*the gradient was exactly 0 or not finite"),
]


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Of the cross-entropy, from torch's own function."""
    leaf = x.clone().requires_grad_()
    labels = y if target is None else target
    loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
    gradient: Tensor = torch.autograd.grad(loss, leaf)[0]
    return gradient if target is None else -gradient


def run(attack: PGD, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """The point after all steps."""
    return attack.perturb(model, x, y, target, index=torch.arange(len(x)))


@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_is_one_step_of_the_sign(targeted: bool) -> None:
    x, model = images(6), Small()
    y = decided(model, x)
    target = (y + 1) % 4 if targeted else None
    threat = ThreatModel("linf", 0.05)
    ours = run(PGD(threat, steps=1, step_size=0.05, random_start=False), model, x, y, target)
    expected = (x + 0.05 * loss_gradient(model, x, y, target).sign()).clamp(0, 1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_agree_with_the_formula(norm: str) -> None:
    x, model = images(6), Small()
    y = decided(model, x)
    eps, size = (0.05, 0.02) if norm == "linf" else (0.6, 0.25)
    ours = run(PGD(ThreatModel(norm, eps), 5, size, False), model, x, y)  # type: ignore[arg-type]
    theirs = x
    for _ in range(5):
        gradient = loss_gradient(model, theirs, y)
        if norm == "linf":
            theirs = torch.min(torch.max(theirs + size * gradient.sign(), x - eps), x + eps).clamp(0, 1)
        else:
            unit = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
            delta = theirs + size * unit - x
            length = delta.flatten(1).norm(dim=1)[:, None, None, None]
            theirs = (x + delta * (eps / length).clamp_max(1)).clamp(0, 1)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_momentum_agrees_with_the_formula(decay: float) -> None:
    x, model = images(6), Small()
    y = decided(model, x)
    ours = run(PGD(ThreatModel("linf", 0.1), 6, 0.02, False, decay=decay), model, x, y)
    theirs, velocity = x, torch.zeros_like(x)
    for _ in range(6):
        gradient = loss_gradient(model, theirs, y)
        velocity = decay * velocity + gradient / gradient.flatten(1).norm(1, dim=1)[:, None, None, None]
        theirs = torch.min(torch.max(theirs + 0.02 * velocity.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    torch.testing.assert_close(ours, theirs)


def test_the_default_step_is_that_of_the_challenge() -> None:
    x, model = 0.4 + 0.2 * images(3), Linear()
    y = decided(model, x)
    ours = run(PGD(ThreatModel("linf", 0.1), steps=10, random_start=False), model, x, y)
    first = run(PGD(ThreatModel("linf", 0.1), steps=1, step_size=0.025, random_start=False), model, x, y)
    assert float((first - x).abs().amax()) == pytest.approx(0.025)
    assert float((ours - x).abs().amax()) == pytest.approx(0.1)


def test_queries_are_steps_and_a_check() -> None:
    x = images(5)
    model = Counting(Small(), x)
    y = decided(Small(), x)
    result = PGD(ThreatModel("linf", 1e-4), steps=7)(QueryOracle(model, 5, known_right=True), x, y)
    assert not result.success.any()
    assert result.queries.tolist() == model.seen.tolist() == [8] * 5
    assert result.checks.tolist() == [1] * 5
    assert result.iterations.tolist() == [7] * 5


# random starts


def starts(norm: str, eps: float, count: int = 3000, shape: tuple[int, ...] = (1, 2, 2)) -> tuple[Tensor, Tensor]:
    x0 = torch.full((count, *shape), 0.5, dtype=torch.float64)
    step = torch.full((count,), -1)
    return random_point(ThreatModel(norm, eps), x0, Draws(0, torch.arange(count), step)), x0  # type: ignore[arg-type]


def test_starts_in_the_cube_are_uniform() -> None:
    x, x0 = starts("linf", 0.2)
    offsets = (x - x0).flatten().numpy()
    assert stats.kstest(offsets, "uniform", args=(-0.2, 0.4)).pvalue > 1e-4


def test_starts_in_the_round_ball_are_uniform() -> None:
    x, x0 = starts("l2", 0.3)
    delta = (x - x0).flatten(1)
    share = (delta.norm(dim=1) / 0.3) ** 4  # the volume within a radius
    assert stats.kstest(share.numpy(), "uniform").pvalue > 1e-4
    direction = delta / delta.norm(dim=1, keepdim=True)
    assert direction.mean(0).abs().max() < 4.5 / math.sqrt(4 * 3000)
    assert (direction.T @ direction / 3000 - torch.eye(4) / 4).abs().max() < 0.03


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("eps", [0.0, 0.7, math.inf])
def test_starts_lie_in_ball_and_box(norm: str, eps: float) -> None:
    x, x0 = starts(norm, eps, 50)
    assert ThreatModel(norm, eps).within(x, x0).all()  # type: ignore[arg-type]
    if eps == 0:
        assert torch.equal(x, x0)


@pytest.mark.filterwarnings("ignore:PGD. the gradient was exactly 0")
def test_restarts_break_what_one_start_does_not() -> None:
    """Adversarial only below 0.5 - 0.15 in two pixels: without a gradient the start must be lucky."""

    class Pocket(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            low = ((x[:, 0, 0, 0] < 0.35) & (x[:, 0, 0, 1] < 0.35)).double()
            return torch.stack([0.5 - low, low - 0.5], 1) + 0 * x.flatten(1).sum(1, keepdim=True)

    x, y = torch.full((200, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(200, dtype=torch.int64)
    rates = [
        float(PGD(ThreatModel("linf", 0.3), steps=1, restarts=restarts)(Pocket(), x, y).success.double().mean())
        for restarts in (1, 10)
    ]
    assert rates[0] == pytest.approx(1 / 16, abs=0.06)
    assert rates[1] == pytest.approx(1 - (15 / 16) ** 10, abs=0.11)


# what it can break


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("settings", [{}, {"decay": 1.0}, {"loss": margin}, {"random_start": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_yardstick(norm: str, settings: dict[str, object], dtype: torch.dtype) -> None:
    model, x, y, distance = near_boundary(8, norm)
    model, x = model.to(dtype), x.to(dtype)
    for factor, wins in ((1.25, True), (0.95, False)):
        threat = ThreatModel(norm, factor * distance)  # type: ignore[arg-type]
        result = PGD(threat, steps=20, **settings)(model, x, y)  # type: ignore[arg-type]
        assert result.success.tolist() == [wins] * 8
        if wins:
            assert (result.distance <= threat.radius * (1 + 1e-5)).all()
            assert (result.distance >= 0.999 * distance).all()
            assert (decided(model, result.x_adv) != y).all()


@pytest.mark.parametrize("eps", ["1/255", "2/255", "4/255", 0.015])
def test_small_radii_in_float32_are_not_lost_to_rounding(eps: float | str) -> None:
    """Every image is broken by the corner of the cube, by a hair."""
    threat = ThreatModel("linf", eps)
    model, x, y, distance = near_boundary(8, "linf")
    with torch.no_grad():
        model.weight *= distance / (0.99 * threat.radius)
        centre = x.flatten(1)[0] @ (model.weight[1] - model.weight[0])
        model.bias[1] = -4.0 - centre
    model, x = model.float(), x.float()
    assert PGD(threat, steps=10)(model, x, y).success.all()


def test_targeted_attacks_reach_their_target() -> None:
    x, model = images(8), Small()
    y = decided(model, x)
    for shift in (1, 2, 3):
        target = (y + shift) % 4
        result = PGD(ThreatModel("linf", 0.5), steps=40)(model, x, y, target)
        assert result.success.double().mean() > 0.7
        assert torch.equal(decided(model, result.x_adv)[result.success], target[result.success])


def test_flat_models_are_borne() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :3] + torch.tensor([3.0, 1, 0], dtype=x.dtype)

    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    for norm in ("linf", "l2", "l1"):
        for decay in (0.0, 1.0):
            threat = ThreatModel(norm, 0.5)  # type: ignore[arg-type]
            result = PGD(threat, steps=3, decay=decay, random_start=False)(Flat(), x, y)
            assert torch.equal(result.x_adv, x)
            assert not result.success.any()


def test_one_nan_in_the_gradient_does_not_freeze_the_momentum() -> None:
    class Kink(nn.Module):
        """The root has no slope at zero, and the first pixel of the gradient is NaN."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            first = x[:, 0, 0, 0]
            return self.inner(x) + 0 * (first - first.detach()).sqrt()[:, None]

    inner, x, y, distance = near_boundary(4, "linf")
    for decay in (0.0, 1.0):
        attack = PGD(ThreatModel("linf", 1.25 * distance), steps=20, decay=decay)
        assert attack(Kink(inner), x, y).success.all()


def test_a_surrogate_is_what_breaks_a_rounded_input() -> None:
    inner, x, y, distance = near_boundary(8, "linf")

    class Coarse(Defense):
        num_classes = 3

        def forward(self, x: Tensor) -> Tensor:
            return inner((x * 64).round() / 64)

    class Declared(Coarse):
        def surrogate(self, x: Tensor, **_: object) -> Tensor:
            return inner(straight_through((x * 64).round() / 64, x))

    attack = PGD(ThreatModel("linf", 3 * distance + 1 / 64), steps=10, random_start=False)
    assert not attack(Coarse(), x, y).success.any()
    assert attack(Declared(), x, y).success.all()


def test_eot_costs_its_draws_and_beats_the_noise() -> None:
    x = images(6)
    model = Noisy(Small(), 4, 0.3)
    y = decided(Small(), x)
    attack = PGD(ThreatModel("linf", 0.3), steps=4, estimator=Autograd(5))
    result = attack(QueryOracle(model, 6, budget=200, known_right=True), x, y)
    assert attack.cost(x.shape[1:]) == 5
    assert (result.queries <= 200).all()
    assert (result.first_hit[result.success] >= 5 + 31).all()


# what is refused


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"step_size": -0.1}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"decay": -1.0}, "decay"),
        ({"threat": ThreatModel("linf", "inf")}, "step_size must be given where eps is inf"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PGD(**arguments)  # type: ignore[arg-type]
