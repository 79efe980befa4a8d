"""Estimates from values within the loop: blocks, budgets, what stays fixed during an estimate."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Recording, Small, decided, images, safe
from torch import Tensor

from lit_adv.attacks import PGD
from lit_adv.draws import Draws
from lit_adv.estimators import NES
from lit_adv.losses import Loss, cross_entropy, margin
from lit_adv.oracle import QueryOracle
from lit_adv.search import Search
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")

BALL = ThreatModel("linf", 0.05)


def nes_attack(steps: int = 3, block: int = 64, **settings: object) -> PGD:
    estimator = NES(10, 0.01, 0.5, block=block)
    arguments = {"step_size": 0.01, "random_start": False, "stop_at_hit": False, "estimator": estimator} | settings
    return PGD(BALL, steps, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [2, 4, 6, 64])
@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_steps_in_blocks_are_those_of_a_plain_loop(block: int, loss: Loss) -> None:
    model, x0 = Small(), images(4)
    y = decided(model, x0)
    x, memory = x0, torch.zeros_like(x0)
    for step in range(3):
        best = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)

        def value(x: Tensor, best: Tensor = best) -> Tensor:
            scores = model(x.flatten(0, -4)).view(*x.shape[:-3], -1)
            if loss is cross_entropy:
                place = y.view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1)
                return -scores.log_softmax(-1).gather(-1, place).squeeze(-1)
            columns = (label.view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1) for label in (best, y))
            theirs, own = (scores.gather(-1, column).squeeze(-1) for column in columns)
            return theirs - own

        u = Draws(0, torch.arange(4), torch.full((4,), step)).normal(
            5, *x0.shape[1:], first=torch.zeros(4, dtype=torch.int64), dtype=torch.float64
        )
        with torch.no_grad():
            slope = value(x.unsqueeze(1) + 0.01 * u) - value(x.unsqueeze(1) - 0.01 * u)
        gradient = (slope[:, :, None, None, None] * u).sum(1) / (10 * 0.01)
        memory = 0.5 * memory + 0.5 * gradient
        x = (x + 0.01 * memory.sign()).clamp(x0 - 0.05, x0 + 0.05).clamp(0, 1)
    result = nes_attack(block=block, loss=loss)(QueryOracle(model, 4), x0, y)
    broken = result.success
    torch.testing.assert_close(result.x_adv[~broken], x[~broken])
    assert (~broken).any()
    assert torch.equal(result.queries, torch.full_like(result.queries, 3 * 11 + 1))
    assert torch.equal(result.checks, torch.full_like(result.checks, 3 + 1))


@pytest.mark.parametrize(("budget", "spent"), [(0, 0), (10, 0), (11, 11), (12, 12), (21, 12), (22, 22), (100, 34)])
def test_an_estimate_is_begun_only_where_it_can_be_paid_whole(budget: int, spent: int) -> None:
    """An estimate is 10 probes and the image; what is left over pays a last look."""
    inner, x, y = safe()
    model = Counting(inner, x)
    result = nes_attack(block=4)(QueryOracle(model, len(x), budget=budget), x, y)
    assert model.seen.tolist() == result.queries.tolist() == [spent] * len(x)


def test_probes_may_be_moved_into_box_and_ball() -> None:
    x = images(1)
    x[0, 0, 0] = 0
    model, _, y = safe()
    given = {}
    for clip in ("none", "box", "ball"):
        recording = Recording(model)
        attack = PGD(BALL, 2, 0.01, False, estimator=NES(10, 0.1, clip=clip))
        attack(QueryOracle(recording, 1), x, y[:1])
        given[clip] = torch.cat(recording.given)
    assert given["none"].min() < 0
    assert given["box"].min() == 0
    assert BALL.distance(given["box"], x).max() > 0.1
    assert (BALL.distance(given["ball"], x) <= 0.05 + 1e-12).all()


def test_kappa_stops_an_image_whose_margin_exceeds_it() -> None:
    model, x = Small(), images(6)
    wrong = (decided(model, x) + 1) % 4
    for kappa, moves in ((0.0, False), (100.0, True)):
        result = nes_attack(loss=margin, kappa=kappa)(QueryOracle(model, 6), x, wrong)
        assert result.success.all()
        assert bool((result.x_adv != x).any()) is moves


@pytest.mark.parametrize(
    "values", [[1.0, 2, 3, 3, 2, 4, 5, 1, 0, 0, 0, 0, 0, 0, 0], [5.0, 4, 3, 2, 1, 0, 9, 8, 7, 6, 5]]
)
def test_the_step_size_is_halved_where_the_loss_stops_rising(values: list[float]) -> None:
    """By a plain list: once 3 losses are held and the newest is no better than the oldest, halve and forget."""
    model, x = Small(), images(2)
    search = Search(nes_attack(), QueryOracle(model, 2), x, decided(model, x), None, torch.arange(2))
    attack = nes_attack(plateau=3, step_size=0.04, min_step_size=0.004)
    state = attack.start(search, torch.arange(2))
    window: list[float] = []
    rate = 0.04
    for value in values:
        window.append(value)
        if len(window) >= 3 and window[-1] <= window[-3]:
            rate, window = max(rate / 2, 0.004), []
        state.value = torch.tensor([value, 7.0], dtype=torch.float64)
        attack._anneal(state, torch.tensor([True, False]))
        assert state.rate.tolist() == pytest.approx([rate, 0.04])
    assert rate < 0.04


def test_noise_before_the_first_step_keeps_the_ball() -> None:
    model, x = Small(), 0.4 + 0.2 * images(5)
    y = decided(model, x)
    recording = Recording(model)
    PGD(BALL, 1, 0.03, False, noise=0.02)(QueryOracle(recording, 5, known_right=True), x, y)
    torch.testing.assert_close((recording.given[0] - x).abs(), torch.full_like(x, 0.02))
    assert (BALL.distance(recording.given[-1], x) <= 0.05 + 1e-9).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kappa": 0.0}, "kappa must be >= 0 and needs loss"),
        ({"kappa": -1.0, "loss": margin}, "kappa must be >= 0"),
        ({"noise": -0.1}, "noise must be >= 0"),
        ({"noise": 0.1, "random_start": True}, "without random_start"),
        ({"plateau": 1}, "plateau must be 0 or at least 2"),
        ({"min_step_size": -1.0, "plateau": 5}, "min_step_size >= 0"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nes_attack(**settings)  # type: ignore[arg-type]
