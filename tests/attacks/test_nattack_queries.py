"""NAttack: what it asks, what that costs, and what it breaks."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Recording, Small, decided, images, near_boundary, safe
from torch import nn

from lit_adv.attacks import NAttack
from lit_adv.losses import hinge, margin
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel


def right(model: nn.Module, rows: int) -> QueryOracle:
    """An oracle whose caller knows that the clean images are classified rightly."""
    return QueryOracle(model, rows, known_right=True)


pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.031), ThreatModel("l2", 0.4)], ids=["linf", "l2"])
@pytest.mark.parametrize("space", ["tanh", "pixel"])
def test_every_query_lies_in_ball_and_box(threat: ThreatModel, space: str) -> None:
    x = images(1)
    x[0, 0, 0] = 0
    x[0, 1, 0] = 1
    model = Recording(safe()[0])
    NAttack(threat, 3, 20, 0.1, 0.3, space=space)(right(model, 1), x, torch.zeros(1, dtype=torch.int64))  # type: ignore[arg-type]
    given = torch.cat(model.given)
    assert len(given) == 61
    assert given.min() >= 0
    assert given.max() <= 1
    assert (threat.distance(given, x) <= threat.radius * (1 + 1e-9)).all()
    assert (threat.distance(given, x) >= 0.9 * threat.radius).double().mean() > 0.5


@pytest.mark.parametrize("shrink", [1e-6, 0.01, 0.1])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-1.0, 1.0)])
def test_the_start_moves_by_half_the_shrink_at_most(shrink: float, box: tuple[float, float]) -> None:
    width = box[1] - box[0]
    x = box[0] + width * images(1)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = box
    model = Recording(safe()[0])
    attack = NAttack(ThreatModel("linf", 0.5, box), 1, 4, init_std=0.0, shrink=shrink, schedule="mean")
    attack(right(model, 1), x, torch.zeros(1, dtype=torch.int64))
    moved = (model.given[0] - x).abs().amax()
    assert moved <= width * shrink / 2 + 1e-12
    assert moved >= 0.99 * width * shrink / 2


@pytest.mark.parametrize("schedule", ["samples", "mean"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_radius_no_change(schedule: str, norm: str) -> None:
    x = images(3)
    model = Recording(Small())
    attack = NAttack(ThreatModel(norm, 0), 2, 6, schedule=schedule)  # type: ignore[arg-type]
    result = attack(model, x, decided(Small(), x))
    assert not result.success.any()
    assert torch.equal(result.x_adv, x)
    assert all(torch.equal(image, x[(x == image).flatten(1).all(1)][0]) for image in torch.cat(model.given))


def test_black_and_white_pixels_are_finite_and_frozen_or_not() -> None:
    model, x, y = safe()
    x[0], x[1] = 0, 1
    for shrink, least, most in ((1e-6, 0, 1e-4), (0.1, 0.05, 0.3)):
        result = NAttack(ThreatModel("linf", 0.3), 20, 20, 0.008, shrink=shrink, loss=margin)(model, x, y)
        moved = (result.x_adv - x).flatten(1).abs().amax(1)
        assert result.x_adv.isfinite().all()
        assert (moved[:2] <= most).all()
        assert (moved[:2] >= least).all()


@pytest.mark.parametrize(
    ("steps", "samples", "block", "every", "tests"),
    [(1, 5, 2, 10, 1), (7, 4, 4, 3, 3), (20, 3, 32, 10, 2), (21, 3, 2, 10, 3), (4, 6, 5, 1, 4)],
)
def test_released_schedule_costs_exactly_its_arithmetic(
    steps: int, samples: int, block: int, every: int, tests: int
) -> None:
    inner, x, y = safe()
    model = Counting(inner, x)
    attack = NAttack(
        ThreatModel("linf", 0.01), steps, samples, schedule="mean", check_every=every, block=block, stop_at_hit=False
    )
    result = attack(QueryOracle(model, 3, chunk=6, known_right=True), x, y)
    assert torch.equal(result.queries, model.seen)
    assert (result.queries - result.checks).tolist() == [samples * steps] * 3
    assert result.checks.tolist() == [tests + 1] * 3  # and the mean after the last update
    assert result.iterations.tolist() == [steps] * 3


def test_released_schedule_looks_at_the_mean_only() -> None:
    """Samples far out are adversarial from the start; the mean is not."""
    model, x, y, distance = near_boundary(4, "linf")
    threat = ThreatModel("linf", 12 * distance)
    settings = {"steps": 1, "samples": 50, "sigma": 3.0, "step_size": 1e-9}
    assert NAttack(threat, **settings)(model, x, y).success.all()  # type: ignore[arg-type]
    assert not NAttack(threat, schedule="mean", **settings)(model, x, y).success.any()  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [5, 20])
def test_a_mean_that_wins_is_the_last_query(block: int) -> None:
    model, x, y, distance = near_boundary(6, "linf")
    counter = Counting(model, x)
    attack = NAttack(
        ThreatModel("linf", 3 * distance), 40, 20, 0.02, schedule="mean", check_every=2, block=block, loss=margin
    )
    result = attack(right(counter, 6), x, y)
    assert result.success.all()
    assert torch.equal(result.queries, result.first_hit)
    assert torch.equal(result.queries, counter.seen)
    steps = result.iterations
    assert (steps > 0).all()
    assert torch.equal(result.queries, 20 * steps + result.checks)
    assert torch.equal(result.checks, steps // 2 + 1)


def test_a_hit_stays_where_it_is_with_more_steps() -> None:
    x = images(8)
    y = decided(Small(), x)
    short, long = (
        NAttack(ThreatModel("linf", 0.2), steps, 20, 0.05)(right(Small(), len(x)), x, y) for steps in (6, 20)
    )
    sampled = short.success & (short.checks == 0)  # not by the check of the mean at the end
    assert sampled.any()
    assert torch.equal(long.first_hit[sampled], short.first_hit[sampled])
    assert torch.equal(long.x_adv[sampled], short.x_adv[sampled])
    assert long.success[short.success & sampled].all()
    assert long.success.sum() > sampled.sum()


def test_a_sample_that_wins_ends_the_row_in_its_block() -> None:
    x = images(8)
    y = decided(Small(), x)
    result = NAttack(ThreatModel("linf", 0.2), 20, 20, 0.05, block=4)(right(Small(), len(x)), x, y)
    won = result.success & (result.checks == 0)
    assert won.any()
    assert (result.queries[won] % 4 == 0).all()
    assert ((result.queries - result.first_hit)[won] < 4).all()
    assert torch.equal((result.first_hit - 1)[won] // 20, result.iterations[won])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_yardstick(norm: str) -> None:
    model, x, y, distance = near_boundary(4, norm)
    for factor, wins in ((1.25, True), (0.95, False)):
        threat = ThreatModel(norm, factor * distance)  # type: ignore[arg-type]
        attack = NAttack(threat, 60, 60, 0.2, 0.1, block=60)
        result = attack(model, x, y)
        assert result.success.tolist() == [wins] * 4
        if wins:
            assert (decided(model, result.x_adv) != y).all()
            assert (result.distance >= 0.999 * distance).all()


def test_targeted_attacks_reach_their_target() -> None:
    x, model = images(6), Small()
    y = decided(model, x)
    target = (y + 1) % 4
    result = NAttack(ThreatModel("linf", 0.5), 40, 30, 0.1, shrink=0.1)(model, x, y, target)
    assert result.success.double().mean() > 0.4
    assert torch.equal(decided(model, result.x_adv)[result.success], target[result.success])


def test_scores_of_any_kind_give_one_result() -> None:
    """The margin of logits is that of log-probabilities."""
    x = images(4)
    y = decided(Small(), x)
    attack = NAttack(ThreatModel("linf", 0.1), 5, 20, 0.05, loss=hinge)
    logits = attack(QueryOracle(Small(), 4, Access.LOGITS), x, y)
    probs = attack(QueryOracle(Small(), 4, Access.PROBS), x, y)
    torch.testing.assert_close(logits.x_adv, probs.x_adv, rtol=0, atol=1e-8)
    assert torch.equal(logits.queries, probs.queries)
