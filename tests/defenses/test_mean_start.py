"""Mean start: the attack on f_a around E g(x), which is invalid by construction and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.nets import SHAPE, Counting, Linear, Noisy, Small, decided, images
from defenses.behind_g import DELTA, defended, linear_reference
from torch import Tensor

from lit_adv.attacks import PGD
from lit_adv.defenses import AdversarialTransformation
from lit_adv.defenses.transformation_attacks import MeanStart, mean_transform
from lit_adv.draws import Draws
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel
from lit_adv.verify import verify

EPS = 0.05
INDEX = torch.tensor([30, 2, 77, 5])


def linear() -> tuple[AdversarialTransformation, Linear]:
    inside = Linear(2, SHAPE, seed=9)
    return AdversarialTransformation(inside, linear_reference(classes=2), delta=DELTA, num_classes=2).eval(), inside


def step(eps: float = EPS) -> PGD:
    return PGD(ThreatModel("linf", eps), 1, eps, False)


def middle(model: AdversarialTransformation, image: Tensor, place: int, draws: int) -> Tensor:
    """E g(x) of one image, draw by draw."""
    made = [model.transform(image[None], Draws(0, torch.tensor([place]), torch.tensor([n]), -7)) for n in range(draws)]
    return sum(made[1:], made[0])[0] / draws


def test_mean_is_that_of_single_draws() -> None:
    model, x = defended(), images(4)
    mean = mean_transform(model, x, 5, INDEX)
    expected = torch.stack([middle(model, image, place, 5) for image, place in zip(x, INDEX.tolist(), strict=True)])
    torch.testing.assert_close(mean, expected)
    assert ((mean - x).abs() <= DELTA + 1e-12).all()


def test_result_is_a_signed_step_on_f_a_from_the_mean() -> None:
    """Of a linear f_a of two classes the steepest direction is known."""
    model, inside = linear()
    x, y = images(4), torch.zeros(4, dtype=torch.int64)
    result = MeanStart(step(), draws=6)(QueryOracle(model, 4, known_right=True), x, y, index=INDEX)
    direction = (inside.weight[1] - inside.weight[0]).detach().sign().view(SHAPE)
    for image, found, place in zip(x, result.x_adv, INDEX.tolist(), strict=True):
        start = middle(model, image, place, 6).clamp(0, 1)
        torch.testing.assert_close(found, (start + EPS * direction).clamp(0, 1))


def test_result_is_far_outside_the_ball_and_no_success_in_it() -> None:
    model, _ = linear()
    x = images(8)
    y = 1 - decided(model.classifier, mean_transform(model, x, 6, torch.arange(8)))  # what f_a does not say there
    result = MeanStart(step(), draws=6)(QueryOracle(model, 8, known_right=True), x, y)
    assert result.success.any()
    won = result.success
    torch.testing.assert_close(result.distance[won], (result.x_adv - x).flatten(1).abs().amax(1)[won])
    assert (result.distance[won] > EPS).all()
    judged = verify(model, ThreatModel("linf", EPS), result.x_adv, x, y)
    assert not judged.verified.any()
    assert not judged.any.any()
    assert (verify(model, result_threat(), result.x_adv, x, y).verified == won).sum() >= 6


def result_threat() -> ThreatModel:
    threat = MeanStart(step()).threat
    assert threat.radius == float("inf")
    return threat


def test_the_defence_is_asked_once_and_what_is_inside_for_free() -> None:
    inner = Small()
    model = AdversarialTransformation(inner, linear_reference(), delta=DELTA, num_classes=4).eval()
    x = images(4)
    y = decided(model, x)
    oracle = QueryOracle(model, 4, budget=1, known_right=True)
    result = MeanStart(step(), draws=3)(oracle, x, y)
    assert result.queries.tolist() == result.checks.tolist() == [1] * 4
    (_, tried), *others = result.counts.values()
    assert (tried, others) == (4, [])


def test_rows_are_the_same_alone_and_shuffled() -> None:
    model, x = defended(), images(4)
    y, attack = decided(model.classifier, x), MeanStart(PGD(ThreatModel("linf", EPS), 4), draws=3)
    whole = attack(QueryOracle(model, 4, known_right=True), x, y, index=INDEX)
    for rows in (torch.tensor([3, 0, 2, 1]), torch.tensor([2])):
        oracle = QueryOracle(model, len(rows), known_right=True, chunk=3)
        other = attack(oracle, x[rows], y[rows], index=INDEX[rows])
        torch.testing.assert_close(other.x_adv, whole.x_adv[rows], rtol=0, atol=1e-9)
        assert torch.equal(other.success, whole.success[rows])


def test_another_threat_model_is_that_of_the_attack_inside() -> None:
    attack = MeanStart(step()).with_threat(ThreatModel("linf", 0.2))
    assert attack.attack.threat.radius == 0.2
    assert attack.threat.radius == float("inf")


@pytest.mark.parametrize(
    "model", [Small(), Noisy(Small(), 4), Counting(Small(), images(4))], ids=lambda m: type(m).__name__
)
def test_other_models_are_refused_by_name(model: torch.nn.Module) -> None:
    with pytest.raises(
        ValueError, match=f"MeanStart attacks a defence that transforms.*{type(model).__name__} is none"
    ):
        MeanStart(step())(model.eval(), images(4), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"attack": PGD}, "attack must be an attack on the classifier inside"),
        ({"draws": 0}, "draws must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MeanStart(**{"attack": step(), **arguments})
