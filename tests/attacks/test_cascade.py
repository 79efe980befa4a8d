"""Cascades against their attacks run by hand, one after another."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Noisy, Small, decided, images
from torch import Tensor

from lit_adv.attack import Attack, AttackResult
from lit_adv.attacks import APGD, DDN, PGD, Boundary, Cascade, NAttack, RandomNoise, Square
from lit_adv.losses import dlr
from lit_adv.oracle import Access, AccessDenied, QueryOracle
from lit_adv.result import broken_by
from lit_adv.threat import ThreatModel

FIVE = ThreatModel("linf", 0.03)


def parts() -> dict[str, Attack]:
    return {
        "one": PGD(ThreatModel("linf", 0.5), steps=1, random_start=False),
        "many": PGD(steps=6, step_size=0.01),
        "square": Square(FIVE, steps=60),
    }


def problem(count: int = 24) -> tuple[Small, Tensor, Tensor]:
    model = Small(scale=4.0).eval()
    x = images(count, 7)
    return model, x, decided(model, x)


def test_each_attack_sees_what_those_before_it_left() -> None:
    model, x, y = problem()
    result = Cascade(FIVE, parts())(QueryOracle(model, len(x), known_right=True), x, y)
    left, success, queries = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.bool), torch.zeros_like(y)
    for name, attack in parts().items():
        index = left
        oracle = QueryOracle(model, len(left), known_right=True)
        found = attack.with_threat(FIVE)(oracle, x[left], y[left], index=index)
        assert result.counts[broken_by(name)] == (int(found.success.sum()), len(left))
        success[left] = found.success
        queries[left] += found.queries
        won = left[found.success]
        torch.testing.assert_close(result.x_adv[won], found.x_adv[found.success])
        assert torch.equal(result.first_hit[won], (queries[left] - found.queries + found.first_hit)[found.success])
        left = left[~found.success]
    assert 0 < len(left) < len(x) - 2
    assert torch.equal(result.success, success)
    assert torch.equal(result.queries, queries)


def test_it_breaks_whatever_one_of_its_attacks_breaks() -> None:
    model, x, y = problem()
    whole = Cascade(FIVE, parts())(model, x, y).success
    for attack in parts().values():
        assert whole[attack.with_threat(FIVE)(model, x, y).success].all()


def test_the_budget_is_one_for_all() -> None:
    inner, x, y = problem()
    for budget in (0, 1, 5, 20):
        model = Counting(inner, x).eval()
        result = Cascade(FIVE, parts())(QueryOracle(model, len(x), budget=budget), x, y)
        assert torch.equal(result.queries, model.seen)
        assert int(result.queries.max()) <= budget


def test_a_wrong_image_is_looked_at_once() -> None:
    inner, x, y = problem(4)
    model = Counting(inner, x).eval()
    result = Cascade(FIVE, {"noise": RandomNoise(), "square": Square(FIVE, steps=5)})(model, x, (y + 1) % 4)
    assert (result.distance == 0).all()
    assert model.seen.tolist() == [1, 1, 1, 1]


def test_told_of_each_row_as_it_ends() -> None:
    model, x, y = problem()
    told: list[tuple[Tensor, AttackResult]] = []
    final = Cascade(FIVE, parts())(model, x, y, finished=lambda rows, result: told.append((rows, result)))
    assert sorted(torch.cat([rows for rows, _ in told]).tolist()) == list(range(len(x)))
    for rows, result in told:
        expected = final[rows]
        for record in ("success", "queries", "checks", "first_hit", "iterations", "x_adv", "distance", "trace"):
            assert torch.equal(getattr(result, record), getattr(expected, record)), record


def test_random_models_and_targets() -> None:
    inner, x, y = problem(6)
    target = (y + 1) % 4
    found = Cascade(ThreatModel("linf", 0.3), {"pgd": PGD(steps=3), "nattack": NAttack(steps=2, samples=10)})(
        QueryOracle(Noisy(inner, 4, 0.01).eval(), 6, known_right=True), x, y, target
    )
    assert (decided(inner, found.x_adv) == target)[found.success].all()
    assert found.success.any()


def test_what_is_no_cascade_is_refused() -> None:
    with pytest.raises(ValueError, match="attacks must name at least one attack"):
        Cascade(FIVE, {})
    with pytest.raises(ValueError, match=r"attacks\['a'\] must be an attack"):
        Cascade(FIVE, {"a": 3})  # type: ignore[dict-item]
    model, x, y = problem(2)
    with pytest.raises(AccessDenied, match="Cascade needs GRADIENT access and was granted LOGITS"):
        Cascade(FIVE, parts())(QueryOracle(model, 2, Access.LOGITS), x, y)


def test_half_precision_images_and_rows_that_do_not_fit() -> None:
    model, x, y = problem(4)
    model = model.float()
    found = Cascade(FIVE, parts())(model, x.half(), y)
    assert found.x_adv.dtype == torch.float32
    with pytest.raises(ValueError, match=r"index must hold one place per image, shape \(4,\), got \(3,\)"):
        Cascade(FIVE, parts())(model, x.float(), y, index=torch.arange(3))
    with pytest.raises(ValueError, match="the oracle has a ledger of 5 rows, but there are 4 images"):
        Cascade(FIVE, parts())(QueryOracle(model, 5), x.float(), y)


def test_a_threat_that_one_of_the_attacks_has_no_rule_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attacks\['ddn'\]: threat must be in l2"):
        Cascade(FIVE, {"pgd": PGD(), "ddn": DDN()})
    with pytest.raises(ValueError, match=r"attacks\['apgd'\]: threat must be a ball of finite eps"):
        Cascade(ThreatModel("l2", "inf"), {"apgd": APGD()})


def test_what_an_attack_refuses_names_it() -> None:
    model = Small(classes=3).eval()
    x = images(4)
    attack = Cascade(ThreatModel("linf", 1e-4), {"ce": APGD(steps=2), "t": APGD(steps=2, loss=dlr, targets=2)})
    with pytest.raises(ValueError, match=r"attacks\['t'\]: the DLR loss needs at least 4 classes, got 3"):
        attack(model, x, decided(model, x))


def test_cascades_within_cascades() -> None:
    inner = Cascade(FIVE, {"pgd": PGD(steps=6)}, seed=3)
    whole = Cascade(FIVE, {"pgd": PGD(steps=1), "both": inner}, seed=7)
    assert whole.attacks["both"].attacks["pgd"].seed == 7  # type: ignore[attr-defined]
    model, x, y = problem()
    found = whole(QueryOracle(model, len(x), known_right=True), x, y).counts
    first, second = found[broken_by("pgd")], found[broken_by("both")]
    assert first[1] == len(x)
    assert second == (found[f"both: {broken_by('pgd')}"][0], len(x) - first[0])


def test_images_that_answer_nan_do_not_end_a_cascade() -> None:
    class Holes(Small):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.flatten(1)[:, :1] > 0.5, torch.nan, super().forward(x))

    model, x = Holes(scale=4.0).eval(), images(8)
    x[:, 0, 0, 0] = torch.tensor([0.1, 0.9]).repeat(4).double()
    y = Small(scale=4.0)(x).argmax(1)
    with pytest.warns(UserWarning, match="not finite"):
        found = Cascade(ThreatModel("linf", 0.3), {"pgd": PGD(steps=4), "apgd": APGD(steps=3)})(model, x, y)
    assert found.success.any()
    assert found.nonfinite > 0


def test_a_stand_in_answers_scores_alone() -> None:
    model, x, y = problem(6)

    class Wrong(Small):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the stand-in was asked")

    label = Cascade(ThreatModel("l2", 0.3), {"boundary": Boundary(ThreatModel("l2", 9.0), steps=3)})
    found = label(QueryOracle(model, 6, fast=Wrong().eval()), x, y)
    plain = label(QueryOracle(model, 6), x, y)
    assert torch.equal(found.x_adv, plain.x_adv)
    assert torch.equal(found.queries, plain.queries)  # nothing is doubtful that the model itself said


def test_images_that_require_a_gradient_give_a_result_without_one() -> None:
    model, x, y = problem(4)
    assert not Cascade(FIVE, parts())(model, x.requires_grad_(), y).x_adv.requires_grad
