"""ZOO against finite differences, torch's Adam, formulas of Newton's step, and a plain loop over the constants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contracts.nets import Counting, Linear, Recording, Small, decided, images, near_boundary, safe
from torch import Tensor, nn

from lit_adv.attack import AttackResult, Search
from lit_adv.attacks import ZOO
from lit_adv.attacks.zoo import ZOOState
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
FAR = ThreatModel("l2", "inf")
PIXELS = 3 * 8 * 8


class Bowl(nn.Module):
    """Two classes whose margin is a quadratic of the image: ``height - curve (x - centre)^2``, never adversarial."""

    def __init__(self, centre: Tensor, curve: Tensor, height: float = 1e3) -> None:
        super().__init__()
        self.centre, self.curve, self.height = centre.flatten(), curve.flatten(), height

    def forward(self, x: Tensor) -> Tensor:
        away = (self.curve * (x.flatten(1) - self.centre) ** 2).sum(1)
        return torch.stack([self.height - away, 0 * away], 1)


def bowl(count: int = 2) -> tuple[Bowl, Tensor, Tensor]:
    model = Bowl(images(1, 5), 1 + images(1, 6))
    return model, 0.3 + 0.4 * images(count, 7), torch.zeros(count, dtype=torch.int64)


class Watched(ZOO):
    """Notes the constants that are tried and the images after each iteration."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.constants: list[float] = []
        self.images: list[Tensor] = []

    def _update(self, search: Search, state: ZOOState, at: Tensor) -> None:
        if int(state.k[at][0]) == 0:
            self.constants.append(float(state.c[at][0]))
        super()._update(search, state, at)
        self.images.append(state.x.clone())


def iterates(model: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> list[Tensor]:
    """The images after each iteration, with one constant."""
    attack = Watched(FAR, search_steps=1, early_stop=None, block=400, **settings)
    attack.perturb(model, x, y, index=torch.arange(len(x)))
    return attack.images


def tanh_point(x: Tensor) -> Tensor:
    return ((2 * x - 1) * 0.9999995).atanh()


def objective(model: Bowl, x: Tensor, x0: Tensor, c: float) -> Tensor:
    logits = model(x)
    return ((x - x0) ** 2).flatten(1).sum(1) + c * (logits[:, 0] - logits[:, 1]).clamp_min(0)


@pytest.mark.parametrize("space", ["pixel", "tanh"])
def test_with_all_coordinates_it_is_torchs_adam(space: Any) -> None:
    model, x, y = bowl()
    w = torch.zeros_like(x, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.01)
    for found in iterates(model, x, y, steps=12, coordinates=PIXELS, step_size=0.01, space=space, constant=5.0):
        start = tanh_point(x)
        image = x + w if space == "pixel" else 0.5 + 0.5 * (start + w).tanh()
        (w.grad,) = torch.autograd.grad(objective(model, image, x, 5.0).sum(), w)
        adam.step()
        image = x + w if space == "pixel" else 0.5 + 0.5 * (start + w).tanh()
        torch.testing.assert_close(found, image.detach(), atol=1e-5, rtol=0)  # 1e-8 stands elsewhere in torch's


@pytest.mark.parametrize("solver", ["newton", "adam_newton"])
@pytest.mark.parametrize("c", [0.01, 0.5])
def test_newtons_step(solver: Any, c: float) -> None:
    """The margin falls with curvature -2 curve, so the objective's is 2 - 2 c curve: positive, then partly negative."""
    model, x, y = bowl()
    model.curve *= 2.2 if c == 0.5 else 1.0
    attack = ZOO(FAR, 1, 1, PIXELS, 0.01, 1e-4, "pixel", solver, c, early_stop=None)
    found = attack.perturb(model, x, y, index=torch.arange(2))
    curve, centre = model.curve.view(1, 3, 8, 8), model.centre.view(1, 3, 8, 8)
    slope, bend = -2 * c * curve * (x - centre), (2 - 2 * c * curve).expand_as(x)
    newton = slope / torch.where(bend < 0, 1.0, bend).clamp_min(0.1)
    step = newton if solver == "newton" else torch.where(bend >= 0, newton, slope.sign())  # Adam's first step
    assert (bend < 0).any() == (c == 0.5)
    sure = (bend.abs() > 1e-4) & ((bend - 0.1).abs() > 1e-4)
    torch.testing.assert_close(found[sure], (x - 0.01 * step)[sure], atol=1e-5, rtol=0)


def test_coordinates_are_drawn_without_replacement_and_only_they_move() -> None:
    model, x, y = bowl()
    found = ZOO(FAR, 1, 1, 40, 0.01, space="pixel", block=24).perturb(model, x, y)
    assert ((found != x).flatten(1).sum(1) == 40).all()
    assert len({tuple(row) for row in (found != x).flatten(1).tolist()}) == 2  # each row draws its own


def test_each_coordinate_has_its_own_step_counter() -> None:
    """Adam's first step on a coordinate has the length of the step size, whenever it is drawn."""
    model, x, y = bowl(1)
    one, two = iterates(model, x, y, steps=2, coordinates=60, step_size=0.01, space="pixel", constant=10.0)
    anew = (one == x) & (two != x)
    assert 20 < int(anew.sum()) < 60
    torch.testing.assert_close(
        (two - x).abs()[anew], torch.full((int(anew.sum()),), 0.01, dtype=x.dtype), rtol=1e-4, atol=0
    )


def test_the_probes_are_the_papers() -> None:
    """Per iteration the image, then each coordinate h up and h down; the image asked is that before the update."""
    inner, x, y = bowl(1)
    model = Recording(inner)
    attack = ZOO(FAR, 2, 1, 10, 0.01, 1e-3, "pixel", block=6, constant=10.0, early_stop=None)
    attack(model, x, y)
    given = torch.cat(model.given)
    assert len(given) == 2 * 21 + 1
    assert torch.equal(given[0], x[0])
    moved = (given[1:21] - x).flatten(1)
    assert ((moved != 0).sum(1) == 1).all()
    place = moved.abs().argmax(1).view(10, 2)
    assert torch.equal(place[:, 0], place[:, 1])
    assert len(set(place[:, 0].tolist())) == 10
    torch.testing.assert_close(moved.sum(1), torch.tensor([1e-3, -1e-3], dtype=x.dtype).repeat(10))
    torch.testing.assert_close(
        (given[21] - x[0]).flatten()[place[:, 0]].abs(), torch.full((10,), 0.01, dtype=x.dtype), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("space", ["pixel", "tanh"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_nearest_adversarial_image_of_a_linear_classifier(norm: Any, space: Any) -> None:
    model, x, y, distance = near_boundary(3, "l2")
    threat = ThreatModel(norm, "inf")
    result = ZOO(threat, 120, 1, PIXELS, 0.006, space=space, constant=1.0, early_stop=None, block=400)(model, x, y)
    reached = (result.x_adv - x).flatten(1).norm(dim=1) / distance
    assert (reached >= 1 - 1e-9).all()
    assert (reached < 1.04 if norm == "l2" else reached < 2).all()
    torch.testing.assert_close(result.distance, threat.distance(result.x_adv, x))


@pytest.mark.parametrize("share", [0.95, 1.25])
def test_a_fixed_radius(share: float) -> None:
    model, x, y, distance = near_boundary(3, "l2")
    threat = ThreatModel("l2", share * distance)
    attack = ZOO(threat, 120, 1, PIXELS, 0.006, constant=1.0, early_stop=None, block=400)
    result = attack(model, x, y)
    each = 2 * PIXELS + 1
    if share < 1:
        assert not result.success.any()
        assert (result.queries == 120 * each + 1).all()
        assert (result.checks == 1).all()
    else:
        assert result.success.all()
        assert torch.equal(result.queries, result.first_hit)  # it ends at once
        assert torch.equal(result.queries, result.iterations * each + 1)
        assert (result.queries < 120 * each).all()


def plain_search(wins: set[float], first: float, tries: int) -> list[float]:
    """The constants that are tried, where exactly those of at least the smallest in ``wins`` succeed."""
    c, lower, upper, tried = first, 0.0, math.inf, []
    for _ in range(tries):
        tried.append(c)
        if c >= min(wins):
            upper = min(upper, c)
        else:
            lower = max(lower, c)
        c = 10 * c if upper == math.inf else (lower + upper) / 2
    return tried


def test_the_constant_is_searched_as_by_carlini_and_wagner() -> None:
    """On a linear classifier the best image of a constant has a closed form, so which succeed is known."""
    model, x, y, distance = near_boundary(1, "l2")
    w = (model.weight[1] - model.weight[0]).detach()
    needed = float(2 * distance / w.norm())  # moving by c w / 2 reaches the boundary
    first = needed / 30
    tried = plain_search({needed}, first, 6)

    attack = Watched(
        FAR, 6 * 100, 6, PIXELS, 0.004, constant=first, space="pixel", early_stop=None, block=400, stop_at_hit=False
    )
    result = attack(model, x, y)
    torch.testing.assert_close(torch.tensor(attack.constants), torch.tensor(tried))
    assert result.success.all()


def test_early_stopping_and_its_schedule() -> None:
    """Where nothing can be gained a constant ends at the second test for progress."""
    model, x, y = safe()
    for early_stop, each, tests in ((5, 30, 5), (0, 30, 3), (None, 30, 29), (7, 30, 7)):
        attack = ZOO(FAR, 3 * each, 3, 10, space="pixel", early_stop=early_stop, constant=1e-30)
        result = attack(model, x, y)
        assert (result.queries - result.checks == 3 * (tests + 1) * 21).all()
        assert torch.equal(result.x_adv, x)


def test_moments_are_forgotten_at_the_first_success() -> None:
    model, x, y, _ = near_boundary(2, "l2")
    settings: dict[str, Any] = {"steps": 40, "coordinates": PIXELS, "step_size": 0.01, "constant": 1.0}
    runs = [iterates(model, x, y, reset_adam=reset, **settings) for reset in (False, True)]
    with torch.no_grad():
        hit = [int((model(image).argmax(1) != y).all()) for image in runs[0]]
    first = hit.index(1)  # the image after `first + 1` updates; its answers are those of the next iteration
    for step in range(first + 2):
        assert torch.equal(runs[0][step], runs[1][step])
    assert not torch.equal(runs[0][first + 2], runs[1][first + 2])
    point = (2 * runs[1][first + 2] - 1).atanh() - (2 * runs[1][first + 1] - 1).atanh()
    torch.testing.assert_close(point.abs(), torch.full_like(point, 0.01), atol=1e-4, rtol=0)  # Adam's first step


@pytest.mark.parametrize("space", ["pixel", "tanh"])
def test_a_thermometer_code_is_never_left(space: Any) -> None:
    """Steps of 1/16 on an 8-bit image are invisible to h = 1e-4: all slopes are zero and nothing moves."""

    class Thermometer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Linear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.model((0.99999 * x.clamp(0, 1) * 16).floor() / 16)

    model = Thermometer()
    x = (images(4) * 255).round() / 255
    y = decided(model, x)
    result = ZOO(ThreatModel("linf", "inf"), 5, 1, 100, space=space, constant=10.0)(model, x, y)
    assert not result.success.any()
    torch.testing.assert_close(result.x_adv, x, rtol=0, atol=1e-6)
    happened, times = result.counts["zero gradient estimates"]
    assert happened == times == 4 * 5 * 100


def test_a_budget_below_an_iteration_spends_nothing_and_the_rest_of_one_is_left() -> None:
    inner, x, y = bowl(3)
    model = Counting(inner, x)
    attack = ZOO(FAR, 5, 1, 20, 0.01, space="pixel", constant=0.1, early_stop=None)
    expected = {0: 0, 1: 0, 40: 0, 41: 41, 42: 42, 81: 42, 82: 82, 100: 83, 205: 205, 206: 206, 999: 206}
    for budget, spent in expected.items():
        model.seen.zero_()
        result = attack(QueryOracle(model, 3, Access.PROBS, budget=budget), x, y)
        assert result.queries.tolist() == [spent] * 3 == model.seen.tolist()
        assert ((result.queries - result.checks) % 41 == 0).all()
        assert result.iterations.tolist() == [spent // 41] * 3
        assert spent or torch.equal(result.x_adv, x)


def same(first: AttackResult, second: AttackResult, rows: Tensor) -> None:
    for name in ("success", "queries", "checks", "first_hit", "iterations"):
        assert torch.equal(getattr(first, name)[rows], getattr(second, name)), name
    torch.testing.assert_close(first.x_adv[rows], second.x_adv, rtol=0, atol=1e-9)
    torch.testing.assert_close(first.distance[rows], second.distance, rtol=0, atol=1e-9)


def test_rows_are_alone_through_constants_grids_and_blocks() -> None:
    model, x = Small(scale=4.0), images(5, 7)
    y = decided(model, x)
    attack = ZOO(
        ThreatModel("l2", 1.0), 60, 3, 20, 0.05, space="pixel", constant=0.5, early_stop=4, reset_adam=True,
        sides=(3, 8), resize_at=(6,), refresh=True, block=12,
    )  # fmt: skip
    whole = attack(QueryOracle(model, 5, chunk=64, budget=2000), x, y)
    assert whole.success.any()
    assert len(set(whole.queries.tolist())) > 2
    for rows, chunk in ((torch.arange(5), 1), (torch.tensor([3, 0, 4, 1, 2]), 30), (torch.tensor([2]), 64)):
        result = attack(QueryOracle(model, len(rows), chunk=chunk, budget=2000), x[rows], y[rows], index=rows)
        same(whole, result, rows)


def test_images_that_are_wrong_at_first_end_at_once() -> None:
    model, x = Small(), images(4)
    y = (decided(model, x) + 1) % 4
    for space in ("pixel", "tanh"):
        result = ZOO(FAR, 5, 1, 10, space=space)(model, x, y)
        assert (result.queries == 1).all()
        assert (result.distance < 1e-5).all()


def test_unknown_answers_leave_their_coordinates_alone() -> None:
    class Holes(Bowl):
        def forward(self, x: Tensor) -> Tensor:
            answer = super().forward(x)
            answer[(x[:, 0, 0, 0] - 0.5).abs() > 1e-9] = math.nan  # whoever touches the first pixel learns nothing
            return answer

    model, x, y = bowl(2)
    x[:, 0, 0, 0] = 0.5
    broken = Holes(model.centre, model.curve)
    attack = ZOO(FAR, 6, 1, PIXELS, 0.01, space="pixel", constant=0.5, early_stop=None)
    blind, seeing = attack.perturb(broken, x, y), attack.perturb(model, x, y)
    assert (blind[:, 0, 0, 0] == 0.5).all()
    assert (seeing[:, 0, 0, 0] != 0.5).all()
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, 0, 0, 0] = False
    torch.testing.assert_close(blind[mask], seeing[mask], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"search_steps": 0}, {"steps": 2, "search_steps": 3}, {"coordinates": 0}, {"step_size": 0.0},
        {"step_size": math.nan}, {"h": 0.0}, {"h": -1e-4}, {"space": "log"}, {"solver": "sgd"}, {"constant": 0.0},
        {"early_stop": -1}, {"block": 1}, {"resize_at": (10,)}, {"sides": (32, 64), "resize_at": ()},
        {"resize_at": (5,), "sides": (64, 32)},
        {"sides": (0,)}, {"sides": (8, 16, 32), "resize_at": (9, 9)}, {"sides": (8, 16), "resize_at": (0,)},
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        ZOO(**wrong)


def test_a_bare_radius_is_refused() -> None:
    with pytest.raises(TypeError, match="ThreatModel"):
        ZOO(0.3)  # type: ignore[arg-type]
