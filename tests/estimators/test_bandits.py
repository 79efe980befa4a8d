"""Bandits against the paper's formulas, computed row by row."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from contracts.nets import Linear, Recording, images, near_boundary
from torch import Tensor

from lit_adv.attacks import PGD
from lit_adv.draws import Draws
from lit_adv.estimators import Bandits
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
BOX = (0.0, 1.0)


def draws(count: int, step: int = 0) -> Draws:
    return Draws(0, torch.arange(count), torch.full((count,), step))


def upsampled(prior: Tensor, height: int, width: int) -> Tensor:
    """Nearest neighbours of one prior (C, h, w), pixel by pixel."""
    _, h, w = prior.shape
    rows = [[prior[:, i * h // height, j * w // width] for j in range(width)] for i in range(height)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("tile", [None, 3, 4, 20])
@pytest.mark.parametrize("update", ["exponentiated", "additive"])
def test_three_steps_by_the_papers_formulas(tile: int | None, update: Literal["exponentiated", "additive"]) -> None:
    shape = (2, 8, 6)
    x, w = images(3, 1, shape), images(1, 2, shape)[0] - 0.5
    estimator = Bandits(tile, 0.7, 0.3, 2.0, update)

    def f(z: Tensor) -> Tensor:
        return (w * z + 0.3 * z**2).flatten(-3).sum(-1)

    memory = estimator.init(x)
    side = (8, 6) if tile in (None, 20) else (tile, tile)
    assert memory.shape == (3, 2, *side)
    assert not memory.any()
    prior = memory.clone()
    for step in range(3):
        change = draws(3, step).normal(2, *side, dtype=x.dtype) * 0.7 / math.sqrt(2 * side[0] * side[1])
        expected = []
        for row in range(3):
            values = []
            for sign in (1, -1):
                q = upsampled(prior[row] + sign * change[row], 8, 6)
                values.append(f(x[row] + 0.3 * q / q.square().sum().sqrt()))
            slope = (values[0] - values[1]) / (0.3 * 0.7) * change[row]
            if update == "additive":
                prior[row] = prior[row] + 2.0 * slope
            else:
                share = (prior[row] + 1) / 2
                up, down = share * (2.0 * slope).exp(), (1 - share) * (-2.0 * slope).exp()
                prior[row] = 2 * up / (up + down) - 1
            expected.append(upsampled(prior[row], 8, 6))
        value, gradient, memory = estimator(f, x, memory, draws(3, step), BOX)
        torch.testing.assert_close(memory.tanh() if update == "exponentiated" else memory, prior)
        torch.testing.assert_close(gradient, torch.stack(expected))
        torch.testing.assert_close(value, f(x))


def test_the_mean_is_along_the_gradient_of_a_linear_function() -> None:
    """From a prior of zero the mean of many first corrections points along the gradient, averaged over tiles."""
    shape = (2, 8, 8)
    w = images(1, 2, shape)[0] - 0.5
    x = images(4000, 1, shape)
    estimator = Bandits(4, 0.1, 0.2, 1.0, "additive")
    _, gradient, memory = estimator(lambda z: (w * z).flatten(-3).sum(-1), x, estimator.init(x), draws(4000), BOX)
    means = w.view(2, 4, 2, 4, 2).mean((2, 4))
    found = memory.mean(0)
    assert torch.nn.functional.cosine_similarity(found.flatten(), means.flatten(), dim=0) > 0.98
    torch.testing.assert_close(gradient.mean(0), upsampled(found, 8, 8))


def test_a_prior_settles_on_the_gradient() -> None:
    """Both priors turn to the gradient of a fixed linear function; that is what they are kept for."""
    w = (images(1, 2, (1, 6, 6))[0] - 0.5).sign()
    x = images(8, 1, (1, 6, 6))
    settings: list[tuple[Literal["exponentiated", "additive"], float]] = [("exponentiated", 1.0), ("additive", 0.1)]
    for update, rate in settings:
        estimator = Bandits(None, 1.0, 0.1, rate, update)
        memory = estimator.init(x)
        for step in range(400):
            _, gradient, memory = estimator(lambda z: (w * z).flatten(-3).sum(-1), x, memory, draws(8, step), BOX)
        likeness = torch.nn.functional.cosine_similarity(gradient.flatten(1), w.flatten()[None])
        assert (likeness > 0.8).all(), update


def test_exponentiated_gradient_neither_overflows_nor_sticks() -> None:
    x = images(4).float()
    estimator = Bandits(None)
    for total in (1e30, math.inf, 1.0):
        gradient, memory = estimator.finish(torch.full_like(x, total), x, estimator.init(x))
        assert (gradient > 1 - 1e-6).all()
        back, _ = estimator.finish(torch.full_like(x, -0.16), x, memory)
        assert (back < 0).all()


def test_unknown_or_flat_values_leave_the_prior_alone() -> None:
    x = images(3)
    estimator = Bandits(4)
    memory = estimator.init(x) + 0.3
    for value in (0.0, math.nan, math.inf):
        constant = torch.full((3, 2), value, dtype=x.dtype)
        _, gradient, after = estimator(lambda z: constant if z.dim() == 5 else constant[:, 0], x, memory, draws(3), BOX)  # noqa: B023
        torch.testing.assert_close(after, memory)
        torch.testing.assert_close(gradient, torch.full_like(x, math.tanh(0.3)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_pgd_it_finds_what_can_be_found(norm: Any) -> None:
    update: Literal["exponentiated", "additive"] = "exponentiated" if norm == "linf" else "additive"
    for share in (1.6, 0.95):
        model, x, y, distance = near_boundary(4, norm)
        threat = ThreatModel(norm, share * distance)
        rate = threat.radius / (10 if norm == "linf" else 5)
        estimator = Bandits(None, 1.0, 0.1, 10.0 if norm == "linf" else 1.0, update)
        attack = PGD(threat, 600, rate, random_start=False, estimator=estimator)
        result = attack(model, x, y)
        assert result.success.all() if share > 1 else not result.success.any()
        assert torch.equal(result.queries - result.checks, 2 * result.iterations) or share > 1


def test_two_probes_and_the_point_in_each_step() -> None:
    inner = Linear()
    with torch.no_grad():
        inner.bias[0] = 1e4
    model, x, y = Recording(inner), images(1), torch.zeros(1, dtype=torch.int64)
    attack = PGD(ThreatModel("l2", 1.0), 3, 0.2, random_start=False, estimator=Bandits(4, 1.0, 0.25, 0.1, "additive"))
    result = attack(QueryOracle(model, 1), x, y)
    assert result.queries.tolist() == [10]
    assert result.checks.tolist() == [4]
    given = torch.cat(model.given)[:9].view(3, 3, -1)
    torch.testing.assert_close((given[:, 1:] - given[:, :1]).norm(dim=2), torch.full((3, 2), 0.25, dtype=x.dtype))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tile": 0}, {"exploration": 0.0}, {"probe_length": -1.0}, {"prior_step_size": 0.0}, {"exploration": math.nan},
        {"probe_length": math.inf}, {"update": "sgd"},
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Bandits(**wrong)
