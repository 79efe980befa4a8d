"""Cascades against their attacks run by hand, one after another."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Noisy, Small, decided, images
from torch import Tensor

from lit_adv.attack import Attack, AttackResult
from lit_adv.attacks import PGD, Cascade, NAttack, RandomNoise, Square
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
