"""Transfer: local attacks against plain loops, what the target is asked, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contracts.nets import Counting, Linear, Noisy, Recording, Small, decided, images, near_boundary
from torch import Tensor, nn

from lit_adv.attacks import PGD, NAttack, Square, Transfer
from lit_adv.attacks.transfer import Joined
from lit_adv.estimators import NES, Autograd
from lit_adv.losses import margin
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was in training mode"),
    pytest.mark.filterwarnings("ignore:.*the gradient was exactly 0 or not finite"),  # where a margin is cut
]

EPS, STEP, STEPS = 0.05, 0.004, 20


class Bent(nn.Module):
    """A classifier that lends another's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.outside, self.inside = local(5), local(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(x)


def local(seed: int = 5) -> Small:
    return Small(seed=seed, scale=4.0)


def ifgs(**arguments: Any) -> PGD:
    given: dict[str, Any] = {"threat": ThreatModel("linf", EPS), "steps": STEPS, "step_size": STEP}
    return PGD(**{**given, "random_start": False, **arguments})


def problem(count: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = Small(scale=4.0), images(count, 7)
    return model, x, decided(model, x)


def climbed(models: list[nn.Module], weights: list[float], x: Tensor, y: Tensor, kappa: float | None) -> Tensor:
    """Signed steps up the weighted sum of the models' losses: cross-entropies, or with kappa their hinges."""
    at = x.clone()
    for _ in range(STEPS):
        at.requires_grad_()
        total = torch.zeros(())
        for model, weight in zip(models, weights, strict=True):
            scores = model(at)
            value = F.cross_entropy(scores, y, reduction="none")
            if kappa is not None:
                own = scores.gather(1, y[:, None]).squeeze(1)
                value = -F.relu(own - scores.scatter(1, y[:, None], -torch.inf).amax(1) + kappa)
            total = total + weight * value.sum()
        (gradient,) = torch.autograd.grad(total, at)
        at = (at.detach() + STEP * gradient.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    return at


@pytest.mark.parametrize("kappa", [None, 0.0, 0.3, 100.0])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.3, 2.0], [1.0, 0.0, 0.5]])
def test_local_images_are_those_of_a_plain_loop(weights: list[float], kappa: float | None) -> None:
    """Where the last image fools the local models, or none does, it is what is tried on the target."""
    _, x, y = problem()
    models: list[nn.Module] = [local(seed) for seed in (5, 6, 7)[: len(weights)]]
    attack = ifgs() if kappa is None else ifgs(loss=margin, kappa=kappa)
    target = Recording(Small())
    Transfer(attack, models, weights)(QueryOracle(target, len(x), known_right=True), x, y)
    (tried,) = target.given
    expected = climbed(models, weights, x, y, kappa)
    shares = torch.tensor(weights) / sum(weights)
    mean = sum(share * model(expected).softmax(1) for share, model in zip(shares, models, strict=True))
    assert isinstance(mean, Tensor)
    last = mean.argmax(1) != y
    assert last.any()
    torch.testing.assert_close(tried[last], expected[last], rtol=0, atol=1e-12)
    assert ((tried - x).abs() <= EPS + 1e-12).all()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("attack", [ifgs(), ifgs(loss=margin, random_start=True), ifgs(estimator=NES(8, 0.01))],
                         ids=["xent", "margin", "nes"])  # fmt: skip
def test_copies_of_a_model_are_the_model(attack: PGD, count: int) -> None:
    model, x, y = problem()
    one, copies = Transfer(attack, [local()]), Transfer(attack, [local() for _ in range(count)])
    first, second = one(model, x, y), copies(model, x, y)
    torch.testing.assert_close(second.x_adv, first.x_adv, rtol=0, atol=1e-9)
    assert torch.equal(second.success, first.success)
    assert second.counts == first.counts


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("share", "won"), [(1.25, True), (0.95, False)])
def test_nearest_image_of_a_linear_twin(norm: Any, share: float, won: bool) -> None:
    model, x, y, distance = near_boundary(6, norm)
    threat = ThreatModel(norm, share * distance)
    twin = Linear()
    twin.load_state_dict(model.state_dict())
    result = Transfer(PGD(threat, 1, share * distance, False), [twin])(QueryOracle(model, 6, known_right=True), x, y)
    assert result.success.tolist() == [won] * 6
    assert result.counts == {"images fooled the local models": (6 * won, 6)}
    torch.testing.assert_close(result.distance[result.success], torch.full((6 * won,), threat.radius).double())


def test_the_target_is_asked_once_and_the_local_models_for_free() -> None:
    model, x, y = problem()
    for budget, queries in ((None, 1), (5, 1), (1, 1), (0, 0)):
        target, source = Counting(model, x), Counting(local(), x)
        oracle = QueryOracle(target, len(x), Access.LABEL, budget, known_right=True)
        result = Transfer(ifgs(), [source])(oracle, x, y)
        assert result.queries.tolist() == result.checks.tolist() == target.seen.tolist() == [queries] * len(x)
        assert bool((source.seen >= STEPS).all()) == bool(queries)
        assert set(result.first_hit[result.success].tolist()) <= {1}
    assert not result.counts  # nothing was tried
    bare = Transfer(ifgs(), [local()])(model, x, y)
    assert bare.queries.tolist() == bare.checks.tolist() == [2] * len(x)  # the clean image before


def test_images_that_fool_no_local_model_are_tried_all_the_same() -> None:
    model, x, y, _ = near_boundary(5, "linf")
    sure = Linear()
    sure.load_state_dict(model.state_dict())
    with torch.no_grad():
        sure.bias[0] += 50
    result = Transfer(ifgs(), [sure])(QueryOracle(model, 5, known_right=True), x, y)
    assert result.success.all()
    assert result.counts == {"images fooled the local models": (0, 5)}


def test_an_image_that_the_local_model_gets_wrong_is_moved_on() -> None:
    model, x, y = problem()
    other = local()
    wrong = decided(other, x) != y
    assert wrong.any()
    result = Transfer(ifgs(stop_at_hit=True), [other])(QueryOracle(model, len(x), known_right=True), x, y)
    assert ((result.x_adv - x).flatten(1).abs().amax(1) > EPS - 1e-9)[wrong].all()


def test_targets() -> None:
    model, x, y = problem(20)
    target = (y + 1) % 4
    recorded = Recording(model)
    result = Transfer(ifgs(threat=ThreatModel("linf", 0.2), step_size=0.02), [model, model])(recorded, x, y, target)
    assert result.success.sum() > 10
    assert torch.equal(decided(model, result.x_adv)[result.success], target[result.success])


@pytest.mark.parametrize("attack", [NAttack(ThreatModel("linf", EPS), 4, 10, 0.05, block=4),
                                    Square(ThreatModel("linf", EPS), 20), ifgs(restarts=2, random_start=True)],
                         ids=["nattack", "square", "restarts"])  # fmt: skip
def test_any_attack_may_run_on_a_local_model(attack: Any) -> None:
    model, x, y = problem()
    result = Transfer(attack, [model])(QueryOracle(model, len(x), known_right=True), x, y)
    assert result.success.any()  # the local model is the target itself
    assert result.success.sum() == result.counts["images fooled the local models"][0]
    assert (result.queries == 1).all()


def test_local_models_may_be_random_and_of_another_type() -> None:
    model, x, y = problem()
    noisy, narrow = Noisy(local(), 4, 0.02), local(6).float()
    attack = Transfer(ifgs(estimator=Autograd(3)), [noisy, narrow, local(7)])
    first = attack(model, x, y, index=torch.arange(40, 52))
    torch.manual_seed(3)
    rows = torch.tensor([7, 2])
    second = attack(model, x[rows], y[rows], index=40 + rows)
    torch.testing.assert_close(second.x_adv, first.x_adv[rows], rtol=0, atol=1e-6)  # a float32 model in between
    single = Transfer(ifgs(), [local(6).float()])(model, x, y)
    assert single.x_adv.dtype == torch.float64
    assert (single.distance[single.success] <= EPS * (1 + 1e-6)).all()


def test_gradients_go_through_the_surrogate_and_the_model_decides() -> None:
    _, x, y = problem()
    source, target = Bent(), Recording(Small())
    Transfer(ifgs(), [source], surrogate="inside")(QueryOracle(target, len(x), known_right=True), x, y)
    (tried,) = target.given
    expected = climbed([source.inside], [1.0], x, y, None)
    last = decided(source.outside, expected) != y  # else an earlier image fooled it, or none did
    assert last.any()
    torch.testing.assert_close(tried[last], expected[last], rtol=0, atol=1e-12)
    found = decided(source.outside, tried) != y
    assert found[last].all()
    plain = Transfer(ifgs(), [source])(Small(), x, y)
    assert not torch.allclose(plain.x_adv, tried)


@pytest.mark.parametrize("surrogate", [None, "surrogate"])
def test_gradients_of_a_random_surrogate_are_averaged_over_draws(surrogate: str | None) -> None:
    _, x, y = problem()
    noisy = Noisy(local(), 4, 0.02)
    attack = Transfer(ifgs(estimator=Autograd(3)), [noisy], surrogate=surrogate)
    attack(QueryOracle(Small(), len(x), known_right=True), x, y)
    asked = sum(len(seen) for seen in noisy.seen)
    assert asked >= 3 * STEPS * len(x)
    expected = Transfer(ifgs(estimator=Autograd(3)), [noisy])(Small(), x, y)
    torch.testing.assert_close(attack(Small(), x, y).x_adv, expected.x_adv, rtol=0, atol=0)


def test_joined_models_decide_by_their_mean_probability() -> None:
    x = images(30)
    models = [local(5), local(6)]
    answer = Joined(models, [1.0, 3.0])(x)
    assert answer.shape == (30, 12)
    parts = [model(x).softmax(1) for model in models]
    torch.testing.assert_close(answer[:, :4], 0.25 * parts[0] + 0.75 * parts[1])
    torch.testing.assert_close(answer[:, 4:8].exp(), parts[0])
    assert (answer.argmax(1) < 4).all()


def test_another_threat_model_goes_to_the_local_attack() -> None:
    model, x, y = problem()
    attack = Transfer(ifgs(), [local()])
    wide = attack.with_threat(ThreatModel("linf", 0.07))(model, x, y)
    assert (wide.x_adv - x).abs().amax() == pytest.approx(0.07)
    assert attack.threat.radius == attack.attack.threat.radius == EPS


@pytest.mark.parametrize("count", [1, 2])
def test_local_models_and_the_attack_given_are_left_alone(count: int) -> None:
    model, x, y = problem()
    source, attack = local().train(), ifgs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Transfer(attack, [source] * count)(model.eval(), x, y)
    assert source.training
    assert attack.stop_at_hit
    assert all(parameter.grad is None for parameter in source.parameters())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"models": []}, "models must hold at least one local model"),
        ({"models": Small()}, "models must be a list of modules"),
        ({"models": ["model_b.ckpt"]}, "models must be a list of modules"),
        ({"attack": PGD}, "attack must be an attack on the local models"),
        ({"weights": [1.0, 1.0]}, r"weights must be one number >= 0 per model \(1\)"),
        ({"weights": [-1.0]}, "weights must be one number >= 0"),
        ({"weights": [0.0]}, "not all 0"),
        ({"weights": [float("nan")]}, "weights must be one number >= 0"),
        ({"models": [Small(), Small()], "attack": Transfer(PGD(), [Small()])}, "Transfer has no loss"),
        ({"surrogate": "softsign"}, "surrogate names a method or a part of the model, and Small has no 'softsign'"),
        ({"models": [Bent(), Bent()], "surrogate": "inside"}, "surrogate 'inside' is of one local model, got 2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Transfer(**{"attack": PGD(), "models": [Small()], **arguments})


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([Small(), Small(classes=3)], "models must know the same classes, got 4, 3"),
        ([Small(classes=2)], "y holds class [23], but the local models know classes 0 to 1"),
        ([Small(), Small(shape=(1, 8, 8))], r"models\[1\], a Small, does not take images of shape \(3, 8, 8\)"),
    ],
)
def test_local_models_of_other_data_are_refused(models: list[nn.Module], said: str) -> None:
    model, x, y = problem()
    target = Counting(model, x)
    with pytest.raises(ValueError, match=said):
        Transfer(ifgs(), models)(QueryOracle(target, len(x), known_right=True), x, y)
    assert not target.seen.any()
