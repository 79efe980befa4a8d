"""The particle swarm against its equations written out with loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.nets import Counting, Linear, Recording, Small, decided, images, near_boundary, safe
from scipy import stats
from torch import Tensor, nn

from lit_adv.attacks import PSO
from lit_adv.attacks.pso import signed_probability
from lit_adv.draws import Draws
from lit_adv.losses import margin
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

EPS = ThreatModel("linf", 0.05)
pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")


def right(model: nn.Module, rows: int) -> QueryOracle:
    """An oracle whose caller knows that the clean images are classified rightly."""
    return QueryOracle(model, rows, known_right=True)


@pytest.mark.parametrize(("steps", "particles", "block"), [(1, 1, 32), (4, 10, 32), (3, 10, 4), (3, 7, 1)])
def test_queries_are_the_swarm_once_and_once_an_iteration(steps: int, particles: int, block: int) -> None:
    model, x, y = safe()
    counting = Counting(model, x)
    result = PSO(EPS, steps, particles, tolerance=0.0, block=block)(right(counting, 3), x, y)
    assert result.queries.tolist() == counting.seen.tolist() == [particles * (1 + steps)] * 3
    assert not result.checks.any()
    assert result.iterations.tolist() == [steps] * 3


def reference(model: nn.Module, x: Tensor, attack: PSO, places: Tensor, velocities: Tensor, index: int) -> Tensor:
    """The best image after all iterations, with loops over particles."""
    lower, upper = (x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1)

    def value(image: Tensor) -> float:
        return float(margin(model(image[None]), torch.zeros(1, dtype=torch.int64)))

    places, velocities = list(places), list(velocities)  # type: ignore[assignment]
    own, values = list(places), [value(place) for place in places]
    best = own[values.index(max(values))]
    for step in range(attack.steps):
        draws = Draws(0, torch.tensor([index]), torch.tensor([step]))
        pulls = draws.uniform(attack.particles, 2, *x.shape, first=torch.tensor([0]), dtype=x.dtype)[0]
        for k in range(attack.particles):
            velocities[k] = 0.3 * velocities[k] + 0.6 * pulls[k, 0] * (own[k] - places[k])
            velocities[k] += 0.9 * pulls[k, 1] * (best - places[k])
            places[k] = torch.minimum(torch.maximum(places[k] + velocities[k], lower), upper)
            if value(places[k]) > values[k]:
                own[k], values[k] = places[k].clone(), value(places[k])
        best = own[values.index(max(values))]
    return best


@pytest.mark.parametrize("block", [3, 32])
def test_agrees_with_the_equations(block: int) -> None:
    model, x, y = safe(count=2)
    attack = PSO(EPS, 6, 8, 0.3, 0.6, 0.9, tolerance=0.0, block=block)
    result = attack(right(model, 2), x, y)
    for row in range(2):
        size = attack._blocks.size * attack._blocks.count
        start = Draws(0, torch.tensor([row]), torch.tensor([-1])).uniform(size, 2, *x.shape[1:], dtype=x.dtype)[0, :8]
        lower, upper = (x[row] - 0.05).clamp(0, 1), (x[row] + 0.05).clamp(0, 1)
        places, velocities = lower + start[:, 0] * (upper - lower), (2 * start[:, 1] - 1) * (upper - lower)
        with torch.no_grad():
            expected = reference(model, x[row], attack, places, velocities, row)
        torch.testing.assert_close(result.x_adv[row], expected)


def test_the_swarm_begins_uniform_and_stays_in_ball_and_box() -> None:
    model, x, y = safe(count=1)
    x[0, 0], x[0, 1] = 0, 1
    recording = Recording(model)
    PSO(EPS, 5, 60)(right(recording, 1), x, y)
    given = torch.cat(recording.given)
    assert EPS.within(given, x.expand_as(given)).all()
    first = (given[:60] - x)[:, 2].flatten()
    assert stats.kstest(first.numpy(), "uniform", args=(-0.05, 0.1)).pvalue > 1e-4
    black = given[:60, 0].flatten()
    assert stats.kstest(black.numpy(), "uniform", args=(0, 0.05)).pvalue > 1e-4


def test_small_improvements_end_the_search() -> None:
    model, x, y = Linear(3), images(3), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        model.weight.mul_(1e-9)
        model.bias[0] = 1e-3
    result = PSO(EPS, 50, 10)(right(model, 3), x, y)
    assert (result.queries < 10 * 51).all()
    assert (result.queries % 10 == 0).all()
    assert (result.queries >= 20).all()


def test_a_flat_loss_is_no_improvement() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :3] + torch.tensor([3.0, 0, 0], dtype=x.dtype)

    _, x, y = safe()
    result = PSO(EPS, 5, 6)(right(Flat(), 3), x, y)
    assert result.queries.tolist() == [36] * 3


def test_answers_that_are_no_numbers_rank_last_or_end_the_search() -> None:
    class Broken(nn.Module):
        """Answers the first time, then NaN to some images."""

        def __init__(self, share: int) -> None:
            super().__init__()
            self.share, self.asked = share, False

        def forward(self, x: Tensor) -> Tensor:
            total = x.flatten(1).sum(1)
            lost = ((total * 1e6).long() % 4 < self.share) & self.asked
            self.asked = True
            return torch.where(lost[:, None], torch.nan, torch.stack([total, -total], 1))

    x, y = 0.2 + 0.6 * images(4), torch.zeros(4, dtype=torch.int64)
    some = PSO(EPS, 10, 8)(Broken(2), x, y)
    assert some.x_adv.isfinite().all()
    assert not some.success.any()
    assert (some.queries > 9).all()
    none = PSO(EPS, 10, 8)(Broken(4), x, y)
    assert none.queries.tolist() == [1 + 8] * 4


@pytest.mark.parametrize("targeted", [False, True])
def test_the_objective_of_the_paper(targeted: bool) -> None:
    scores = torch.tensor([[[2.0, 1, 0], [0, 3, 1]], [[0, 1, 4], [5, 1, 1]]])
    y, target = torch.tensor([0, 2]), torch.tensor([1, 0])
    signs = torch.tensor([[-1.0, 1], [-1, 1]])
    expected = signs * scores.softmax(-1).amax(-1)
    torch.testing.assert_close(signed_probability(scores, y, target if targeted else None), expected)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", [margin, signed_probability])
def test_finds_what_exists_on_a_linear_model(targeted: bool, loss: Any) -> None:
    model, x, y, distance = near_boundary(4, "linf")
    target = y + 1 if targeted else None
    won = PSO(ThreatModel("linf", 5 * distance), 100, 40, 0.7, loss=loss)(model, x, y, target)
    assert won.success.all()
    lost = PSO(ThreatModel("linf", 0.95 * distance), 20, 20, loss=loss)(model, x, y, target)
    assert not lost.success.any()


def test_an_unlimited_ball_is_the_box() -> None:
    x, model = images(4), Small(scale=4.0)
    y = decided(model, x)
    result = PSO(ThreatModel("linf", "inf"), 10, 20)(model, x, y)
    assert result.success.all()
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"threat": ThreatModel("l2", 3.0)}, "l2"),
        ({"steps": 0}, "steps"),
        ({"particles": 0}, "particles"),
        ({"block": 0}, "block"),
        ({"inertia": -0.1}, "inertia"),
        ({"own": float("nan")}, "own"),
        ({"swarm": -1.0}, "swarm"),
        ({"tolerance": -1.0}, "tolerance"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PSO(**arguments)
