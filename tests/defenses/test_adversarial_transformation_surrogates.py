"""Gradients of f_a(g(x)): what each surrogate differentiates, against matrices multiplied by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from contracts.nets import Small, images
from defenses.behind_g import CLASSES, DELTA, defended, keyed, linear_reference
from torch import Tensor, nn

from lit_adv.attacks import PGD
from lit_adv.defenses import AdversarialTransformation
from lit_adv.estimators import Autograd
from lit_adv.gradients import gradient_of
from lit_adv.losses import cross_entropy
from lit_adv.metrics import Records
from lit_adv.metrics.summary import robust_accuracy, worst_case
from lit_adv.models import SmallVGG
from lit_adv.oracle import QueryOracle
from lit_adv.search import Search
from lit_adv.state import State
from lit_adv.threat import ThreatModel

SMOOTH = ("softsign", "tanh", "softsign_scaled", "tanh_scaled", "softsign_literal", "tanh_literal")
NAMES = ("surrogate", "unrolled", *SMOOTH)
SHAPE = (1, 3, 3)
Answer = Callable[..., Tensor]


def tiny(**settings: object) -> AdversarialTransformation:
    """Nine pixels, so that Hessians can be written out; a curved f_b."""
    return defended(Small(CLASSES, SHAPE, seed=5, scale=6.0), SHAPE, **settings)


def gradient(answer: Answer, x: Tensor, **given: object) -> Tensor:
    """Of the cross-entropy to class 1, image by image in one pass."""
    leaf = x.clone().requires_grad_()
    labels = torch.ones(len(x), dtype=torch.int64)
    loss = nn.functional.cross_entropy(answer(leaf, **given), labels, reduction="sum")
    (found,) = torch.autograd.grad(loss, leaf)
    return found


def at(classifier: nn.Module, z: Tensor) -> Tensor:
    return gradient(classifier, z)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"box": True}, {"mode": "untargeted"}, {"random_start": False}])
def test_every_surrogate_has_the_deployed_value(name: str, settings: dict[str, bool | str]) -> None:
    x = images(5)
    model = defended(Small(seed=5, scale=4.0), **settings)
    deployed = model(x, draws=keyed(5))
    torch.testing.assert_close(getattr(model, name)(x, draws=keyed(5)), deployed)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(getattr(model, name)(leaf, draws=keyed(5)), deployed, atol=1e-9, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(getattr(model, name)(leaf, draws=keyed(5)), deployed)


@pytest.mark.parametrize("name", NAMES)
def test_5_without_steps_and_start_all_attacks_are_plain_pgd(name: str) -> None:
    x = images(6)
    model = defended(steps=0, random_start=False)
    y = model.classifier(x).argmax(1)
    attack = PGD(ThreatModel(eps=0.05), 6, stop_at_hit=False)
    plain = attack(model.classifier, x, y)
    found = attack(QueryOracle(model, 6, surrogate=name), x, y)
    assert torch.equal(model.transform(x), x)
    torch.testing.assert_close(found.x_adv, plain.x_adv, atol=1e-12, rtol=0)
    transferred = attack(QueryOracle(model, 6, surrogate="classifier"), x, y)
    torch.testing.assert_close(transferred.x_adv, plain.x_adv, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_5_a_radius_of_zero_is_no_transformation_for_any_surrogate(name: str) -> None:
    x = images(3)
    model = defended(delta=0)
    found = gradient(getattr(model, name), x)
    torch.testing.assert_close(found, at(model.classifier, x))


@pytest.mark.parametrize("settings", [{}, {"steps": 2}, {"random_start": False}, {"mode": "untargeted"}])
def test_6_autograd_through_the_unrolled_g_is_the_identity(settings: dict[str, int | bool | str]) -> None:
    x = images(5)
    model = defended(Small(seed=5, scale=4.0), **settings)
    unrolled, passed = (gradient(getattr(model, n), x, draws=keyed(5)) for n in ("unrolled", "surrogate"))
    torch.testing.assert_close(unrolled, passed, rtol=1e-5, atol=1e-9)
    assert float(passed.abs().max()) > 0


def test_6_so_it_is_by_finite_differences_where_no_sign_flips() -> None:
    """g moves with x almost everywhere, so a central difference of a pixel of g is 1 there and 0 elsewhere."""
    x = images(3, shape=SHAPE)
    model = tiny()
    for pixel in range(9):
        step = torch.zeros(SHAPE, dtype=torch.float64)
        step.view(-1)[pixel] = 1e-7
        up, down = (model.transform(x + sign * step, keyed(3)) for sign in (1, -1))
        torch.testing.assert_close((up - down) / 2e-7, (step / 1e-7).expand(3, *SHAPE), atol=1e-6, rtol=0)


def test_6_a_smooth_sign_without_slope_is_the_identity_too() -> None:
    x = images(4)
    model = defended(Small(seed=5, scale=4.0))
    flat = gradient(lambda v, draws: model._classified(model._smooth(v, draws, lambda slope: 0 * slope)), x,
                    draws=keyed(4))  # fmt: skip
    torch.testing.assert_close(flat, gradient(model.surrogate, x, draws=keyed(4)), rtol=1e-5, atol=1e-9)


def test_7_the_gradient_at_x_is_the_classifiers_at_g_of_x() -> None:
    x = images(5)
    for settings in ({}, {"norm": "l2"}, {"mode": "noise"}, {"box": True}):
        model = defended(**settings)
        z = model.transform(x, keyed(5))
        for answer in (model.surrogate, model):
            torch.testing.assert_close(gradient(answer, x, draws=keyed(5)), at(model.classifier, z))


def bpda_by_hand(
    model: AdversarialTransformation, x: Tensor, start: Tensor, kind: str, scaled: bool, literal: bool
) -> Tensor:
    """The BPDA gradient of one image, (9,): Jacobians as 9 x 9 matrices, Hessians of f_b's loss written out."""
    network, eye, size = model.reference, torch.eye(9, dtype=torch.float64), DELTA / 6
    with torch.no_grad():
        target = network(x[None]).argmin(1)

    def loss(point: Tensor) -> Tensor:
        return nn.functional.cross_entropy(network(point.view(1, *SHAPE)), target)

    delta, moved = start.flatten(), eye.clone() if literal else torch.zeros_like(eye)
    for _ in range(model.steps):
        point = x.flatten() + delta
        slope = torch.autograd.functional.jacobian(loss, point)
        hessian = torch.autograd.functional.hessian(loss, point)
        tau = slope.abs().sort().values[4] if scaled else torch.tensor(1.0)
        v = slope / tau
        bent = ((1 + v.abs()) ** -2 if kind == "softsign" else 1 - v.tanh() ** 2) / tau
        offset = delta - size * slope.sign()
        passing = torch.tensor([1.0 if abs(u) < DELTA else 1 / (1 + abs(u)) ** 2 for u in offset.tolist()])
        through = moved if literal else eye + moved
        moved = passing.double()[:, None] * (moved - size * bent[:, None] * (hessian @ through))
        delta = offset.clamp(-DELTA, DELTA)
    whole = moved if literal else eye + moved
    outer = at(model.classifier, (x.flatten() + delta).view(1, *SHAPE)).flatten()
    return whole.T @ outer


@pytest.mark.parametrize("steps", [1, 5, 13])
@pytest.mark.parametrize("name", SMOOTH)
def test_bpda_is_the_product_of_jacobians_written_out(name: str, steps: int) -> None:
    x = images(3, shape=SHAPE)
    model = tiny(steps=steps)
    start = model.variant(steps=0).transform(x, keyed(3)) - x
    found = gradient(getattr(model, name), x, draws=keyed(3))
    kind, scaled, literal = name.split("_")[0], name.endswith("scaled"), name.endswith("literal")
    for i in range(3):
        expected = bpda_by_hand(model, x[i], start[i], kind, scaled, literal)
        torch.testing.assert_close(found[i].flatten(), expected, rtol=1e-5, atol=1e-8)  # 13 products of slopes of 1e2
    identity = gradient(model.surrogate, x, draws=keyed(3))
    assert not torch.allclose(found, identity, rtol=1e-3)  # there is something to be tested


def test_no_image_sees_another_in_any_backward_pass() -> None:
    x = images(4)
    model = defended(Small(seed=5, scale=6.0))
    for name in NAMES:
        whole = gradient(getattr(model, name), x, draws=keyed(4))
        for i in range(4):
            alone = gradient(getattr(model, name), x[i : i + 1], draws=keyed(1, first=i))
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_relu_max_pool_and_batch_norm_have_second_derivatives(name: str) -> None:
    torch.manual_seed(0)
    network = SmallVGG(num_classes=CLASSES, image_size=16, width=4)
    x = torch.rand(2, 3, 16, 16)
    model = defended(network, (3, 16, 16), steps=3).float()
    found = gradient(getattr(model, name), x, draws=keyed(2))
    assert found.isfinite().all()
    assert found.dtype == torch.float32
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gain", [0.0, 1e5])
def test_vanished_and_saturated_gradients_stay_finite(name: str, gain: float) -> None:
    """Constant scores, or a softmax that is 0 and 1 to the last bit: nowhere to go but the start."""
    network = linear_reference()
    with torch.no_grad():
        network.weight *= gain * torch.tensor([[0.0], [0.0], [0.0], [1.0]])
        network.bias.copy_(torch.tensor([gain, 0.0, 0.0, 0.0]))
    x = images(3).float()
    model = defended(network, mode="untargeted").float()
    z = model.transform(x, keyed(3))
    torch.testing.assert_close(z, model.variant(steps=0).transform(x, keyed(3)))
    found = gradient(getattr(model, name), x, draws=keyed(3))
    assert found.isfinite().all()
    if not name.endswith("literal"):  # which shrinks with every element that lies on the face
        torch.testing.assert_close(found, at(model.classifier, z), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_cannot_be_unrolled_says_what_to_do(name: str) -> None:
    x = images(2).requires_grad_()
    for settings in ({"norm": "l2"}, {"mode": "noise"}, {"mode": "spatial"}):
        model = defended(**settings)
        with pytest.raises(ValueError, match=r"mode '\w+' and norm '\w+' has no unrolled .*default surrogate"):
            getattr(model, name)(x)
        with torch.no_grad():
            getattr(model, name)(x)


# expectation over transformation


def eot_gradient(model: AdversarialTransformation, x: Tensor, eot: int, chunk: int, step: int = 0) -> Tensor:
    count = len(x)
    y = torch.ones(count, dtype=torch.int64)
    oracle = QueryOracle(model, count, chunk=chunk)
    search = Search(PGD(), oracle, x, y, None, torch.arange(count))
    state = State(**search.fresh(torch.arange(count)))
    for _ in range(step):  # earlier questions, so that later draws are asked
        oracle.scores(x, torch.arange(count))
    _, found, _ = gradient_of(search, state, lambda s: cross_entropy(s, y), eot)
    return found


@pytest.mark.parametrize("chunk", [3, 64])
def test_10_the_mean_of_eight_is_that_of_eight_single_draws(chunk: int) -> None:
    x = images(3)
    model = defended(Small(seed=5, scale=4.0), steps=4)
    found = eot_gradient(model, x, 8, chunk)
    singles = torch.stack([eot_gradient(model, x, 1, 64, step) for step in range(8)])
    assert len(singles[:, 0, 0, 0, 0].unique()) == 8
    torch.testing.assert_close(found, singles.mean(0), rtol=1e-9, atol=1e-12)


def test_10_one_draw_is_a_single_draw_and_none_is_refused() -> None:
    x = images(3)
    model = defended()
    draws = QueryOracle(model, 3)._draws(torch.arange(3))
    assert draws is not None
    torch.testing.assert_close(eot_gradient(model, x, 1, 2), gradient(model.surrogate, x, draws=draws))
    with pytest.raises(ValueError, match="eot"):
        Autograd(0)


def test_11_no_attack_leaves_its_ball_and_the_worst_case_is_the_least() -> None:
    x, radius = images(8), 0.1
    model = defended(Small(seed=5, scale=4.0), steps=2)
    with torch.no_grad():
        y = torch.stack([model(x, draws=keyed(8, step=s)) for s in range(20)]).mean(0).argmax(1)
    parts, broken = [], torch.zeros(8, dtype=torch.bool)
    for name in (*NAMES, "classifier"):
        oracle = QueryOracle(model, 8, surrogate=name)
        result = PGD(ThreatModel(eps=radius), 3, estimator=Autograd(2))(oracle, x, y)
        assert float((result.x_adv - x).abs().max()) <= radius + 1e-6
        assert float(result.x_adv.min()) >= 0
        assert float(result.x_adv.max()) <= 1
        broken |= result.success
        blank = {field.name: torch.zeros(8) for field in dataclasses.fields(Records)}
        known = {"index": torch.arange(8), "clean_correct": torch.ones(8, dtype=torch.bool), "verified": result.success}
        parts.append(Records(**{**blank, **known}))
    least = robust_accuracy(worst_case(parts))
    assert least == 1 - float(broken.double().mean())
    for records in parts:
        alone = robust_accuracy(records)
        assert alone is not None
        assert least <= alone


def test_17_the_spread_of_the_mean_gradient_falls_with_the_root_of_the_draws() -> None:
    x = images(1)
    model = defended(mode="noise", delta=0.5)
    spread = {}
    for count in (4, 64):
        batch = x.expand(count, -1, -1, -1)
        means = [gradient(model.surrogate, batch, draws=keyed(count, step=step)).mean(0) for step in range(100)]
        spread[count] = float(torch.stack(means).std(0).norm())
    assert 3 <= spread[4] / spread[64] <= 5


def test_19_an_undefended_network_falls() -> None:
    x = images(20)
    model = defended()
    y = model.classifier(x).argmax(1)
    assert PGD(ThreatModel(eps=0.3), 20)(model.classifier, x, y).success.all()
