"""The boundary attack against a plain loop over one image, and against a known nearest image."""

from __future__ import annotations

import itertools
import math
from collections import deque

import numpy as np
import pytest
import torch
from contracts.nets import Linear, Recording, Small, decided, images, near_boundary, safe
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_adv.attacks import Boundary
from lit_adv.draws import Draws
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
Array = NDArray[np.float64]
L2 = ThreatModel("l2", "inf")


def length(x: Array) -> float:
    return float(np.sqrt((x**2).sum()))


class Reference:
    """One image, one query at a time; counts them and keeps every point the walk has stood on."""

    def __init__(self, attack: Boundary, model: nn.Module, x0: Tensor, y: int, index: int) -> None:
        self.attack, self.model, self.y, self.index = attack, model, y, index
        self.x0: Array = x0.numpy()
        self.queries, self.nearest = 0, math.inf
        self.path: list[float] = []
        self.on_sphere: deque[bool] = deque(maxlen=100)
        self.steps: deque[bool] = deque(maxlen=30)
        self.sphere, self.source = attack.spherical_step, attack.source_step

    def adversarial(self, x: Array) -> bool:
        self.queries += 1
        with torch.no_grad():
            won = int(self.model(torch.tensor(x)[None]).argmax()) != self.y
        if won:  # also on the sphere, which the box may bring nearer
            self.nearest = min(self.nearest, length(x - self.x0))
        return won

    def draws(self, step: int, key: int) -> Draws:
        return Draws(self.attack.seed, torch.tensor([self.index]), torch.tensor([step]), key)

    def begin(self) -> Array:
        for number in itertools.count():
            noise = self.draws(0, 1).uniform(1, *self.x0.shape, first=torch.tensor([number]), dtype=torch.float64)
            first: Array = noise[0, 0].numpy()
            if self.adversarial(first):
                break
        low, high = 0.0, 1.0
        while high - low > 1e-3:
            middle = (low + high) / 2
            if self.adversarial((1 - middle) * self.x0 + middle * first):
                high = middle
            else:
                low = middle
        return (1 - high) * self.x0 + high * first

    def proposals(self, x: Array, step: int) -> tuple[Array, Array]:
        way = self.x0 - x
        radius = length(way)
        draws = self.draws(step - 1, 0)
        noise = draws.normal(1, *x.shape, first=torch.zeros(1, dtype=torch.int64), dtype=torch.float64)[0, 0].numpy()
        noise = noise - (noise * way / radius).sum() * way / radius
        noise = noise * self.sphere * radius / length(noise)
        sphere = np.clip(self.x0 + (noise - way) / math.sqrt(1 + self.sphere**2), 0, 1)
        inward = self.x0 - sphere
        reach = max(0.0, self.source * radius + length(inward) - radius)
        return sphere, np.clip(sphere + reach * inward / length(inward), 0, 1)

    def adapt(self) -> None:
        factor = self.attack.adaptation
        if len(self.on_sphere) == 100:
            rate = float(np.mean(self.on_sphere))
            if rate > 0.5 or rate < 0.2:
                self.sphere *= factor if rate > 0.5 else 1 / factor
                self.source *= factor if rate > 0.5 else 1 / factor
                self.on_sphere.clear()
        if len(self.steps) == 30:
            rate = float(np.mean(self.steps))
            if rate > 0.25 or rate < 0.1:
                self.source *= factor if rate > 0.25 else 1 / factor
                self.steps.clear()

    def run(self) -> None:
        x = self.begin()
        for step in range(1, self.attack.steps + 1):
            if self.source < self.attack.converged:
                return
            sphere, candidate = self.proposals(x, step)
            won = self.adversarial(candidate)
            if step % self.attack.check_every == 0:
                self.on_sphere.append(self.adversarial(sphere))
                self.steps.append(won)
                self.adapt()
            if won and length(candidate - self.x0) < length(x - self.x0):
                x = candidate
            self.path.append(length(x - self.x0))


@pytest.mark.parametrize(
    "settings",
    [{}, {"check_every": 1}, {"check_every": 1, "spherical_step": 0.3}, {"check_every": 1, "converged": 0.004}],
    ids=str,
)
def test_the_walk_is_the_papers(settings: dict[str, float]) -> None:
    steps = 260 if "check_every" in settings else 40
    attack = Boundary(L2, steps, seed=3, **settings)  # type: ignore[arg-type]
    model, x = Small(scale=4.0), images(3, 7)
    y, index = decided(model, x), torch.tensor([30, 2, 1000])
    result = attack(QueryOracle(model, 3, chunk=50, known_right=True), x, y, index=index)
    rates = []
    for row in range(3):
        reference = Reference(attack, model, x[row], int(y[row]), int(index[row]))
        reference.run()
        assert int(result.queries[row]) == reference.queries
        assert float(result.distance[row]) == pytest.approx(reference.nearest, abs=1e-9)
        assert (np.diff(reference.path) <= 1e-12).all()
        rates.append(reference.source)
    assert (result.checks == 0).all()
    assert ("check_every" in settings) == any(rate != attack.source_step for rate in rates)  # adaptation was met


def small_plane(count: int) -> tuple[Linear, Tensor, Tensor]:
    """A linear classifier of 16 values, and images at distance 0.2 from its other class."""
    model, x = Linear(2, (1, 4, 4)), 0.4 + 0.2 * images(1, 3, (1, 4, 4))
    with torch.no_grad():
        way = model.weight[1] - model.weight[0]
        model.bias[0] = way @ x.flatten() + 0.2 * way.norm()
    return model, x.repeat(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64)


def test_the_nearest_image_of_a_linear_classifier_is_found() -> None:
    model, x, y = small_plane(4)
    result = Boundary(L2, 600, spherical_step=0.3, source_step=0.1, check_every=1)(model, x, y)
    assert (result.distance <= 1.04 * 0.2).all()
    assert (result.distance >= 0.2 * (1 - 1e-9)).all()
    for row in range(4):  # each hit kept is nearer than the one before
        assert (result.trace[result.trace[:, 0] == row][:, 3].diff() < 0).all()


def test_a_radius_beyond_the_nearest_image_is_won_and_one_below_is_not() -> None:
    model, x, y = small_plane(4)
    wide = Boundary(ThreatModel("l2", 1.25 * 0.2), 600, 0.3, 0.1, check_every=1)(model, x, y)
    assert wide.success.all()
    assert torch.equal(wide.first_hit, wide.queries)
    narrow = Boundary(ThreatModel("l2", 0.95 * 0.2), 150, 0.3, 0.1, check_every=1)(model, x, y)
    assert not narrow.success.any()
    assert narrow.distance.isfinite().all()  # the nearest adversarial image outside


def test_labels_are_enough() -> None:
    model, x, y, _ = near_boundary(3, "l2")

    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return decided(model, x)

    told = Boundary(L2, 20)(QueryOracle(Labels(), 3, Access.LABEL, output="labels"), x, y)
    torch.testing.assert_close(told.x_adv, Boundary(L2, 20)(model, x, y).x_adv, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tries", [1, 16, 17, 200])
def test_no_beginning_is_an_honest_failure(tries: int) -> None:
    model, x, y = safe()
    result = Boundary(L2, init_tries=tries)(model, x, y)
    assert not result.success.any()
    assert torch.equal(result.x_adv, x)
    assert (result.distance == math.inf).all()
    assert (result.queries - result.checks == tries).all()
    assert (result.checks == 1).all()  # the clean image of a bare call
    assert (result.iterations == 0).all()


def test_images_to_begin_at_are_asked_first() -> None:
    model, x, y, nearest = near_boundary(3, "l2")
    towards = (model.weight[1] - model.weight[0]).detach().view(1, 3, 8, 8)

    def starts(x0: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        return x0 + 1.5 * nearest * towards / towards.norm()

    recording = Recording(model)
    result = Boundary(L2, 5, starts=starts)(QueryOracle(recording, 3, known_right=True), x, y)
    torch.testing.assert_close(recording.given[0], starts(x, y, None))
    assert (result.distance < 1.01 * nearest).all()  # the blend alone reaches the boundary
    with pytest.raises(ValueError, match="starts must give one image for each"):
        Boundary(L2, 1, starts=lambda x0, y, target: x0[:1])(model, x, y)


def test_the_last_query_of_a_budget_is_spent_on_the_step() -> None:
    model, x, y, _ = near_boundary(3, "l2")
    whole = Boundary(L2, 30, check_every=3)(model, x, y)
    for budget in (18, 20, 21, 22, 23, 24, 33):
        result = Boundary(L2, 30, check_every=3)(QueryOracle(model, 3, budget=budget), x, y)
        assert (result.queries == whole.queries.clamp_max(budget)).all()


def test_answers_of_nan_are_no_success() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = Small(scale=4.0)(x)
            lost = (x.flatten(1).sum(1) * 1e4).floor() % 5 == 0
            return scores.masked_fill(lost[:, None], torch.nan)

    x = images(3, 7)
    y = decided(Small(scale=4.0), x)
    result = Boundary(L2, 100)(Failing(), x, y)
    assert result.x_adv.isfinite().all()
    assert (decided(Small(scale=4.0), result.x_adv) != y)[result.success].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threat": ThreatModel("linf", 0.1)}, "norm 'linf'"),
        ({"steps": 0}, "steps"),
        ({"check_every": 0}, "check_every"),
        ({"init_tries": 0}, "init_tries"),
        ({"block": 0}, "block"),
        ({"spherical_step": 0.0}, "spherical_step"),
        ({"source_step": math.nan}, "source_step"),
        ({"adaptation": 1.0}, "adaptation"),
        ({"converged": -1.0}, "converged"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Boundary(**arguments)  # type: ignore[arg-type]
