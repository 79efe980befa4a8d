"""HopSkipJump against a plain loop over one image, written from the paper, and against a known nearest image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from contracts.nets import Linear, Recording, Small, decided, images, near_boundary, safe
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_adv.attack import Search
from lit_adv.attacks import HopSkipJump
from lit_adv.attacks.hop_skip_jump import HopSkipJumpState
from lit_adv.draws import Draws
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
Array = NDArray[np.float64]
L2, LINF = ThreatModel("l2", "inf"), ThreatModel("linf", "inf")


class Reference:
    """One image, one query at a time; counts them and keeps the nearest adversarial image."""

    def __init__(self, attack: HopSkipJump, model: nn.Module, x0: Tensor, y: int, index: int) -> None:
        self.attack, self.model, self.y, self.index = attack, model, y, index
        self.x0: Array = x0.numpy()
        self.size = self.x0.size
        self.queries, self.nearest = 0, math.inf
        self.linf = attack.threat.norm == "linf"

    def distance(self, x: Array) -> float:
        delta = x - self.x0
        return float(np.abs(delta).max() if self.linf else np.sqrt((delta**2).sum()))

    def adversarial(self, x: Array, kept: bool = True) -> bool:
        self.queries += 1
        with torch.no_grad():
            won = int(self.model(torch.tensor(x)[None]).argmax()) != self.y
        if won and kept:
            self.nearest = min(self.nearest, self.distance(x))
        return won

    def draws(self, step: int, key: int) -> Draws:
        return Draws(self.attack.seed, torch.tensor([self.index]), torch.tensor([step]), key)

    def bisect(self, at: Callable[[float], Array], low: float, high: float, threshold: float) -> tuple[float, float]:
        while high - low > threshold:
            middle = (low + high) / 2
            if self.adversarial(at(middle)):
                high = middle
            else:
                low = middle
        return low, high

    def back(self, x: Array, low: float = 0.0) -> tuple[Array, float]:
        """To the boundary: the point and the distance at which the bisection began."""
        span = self.distance(x)
        if self.linf:

            def at(radius: float) -> Array:
                return np.clip(x, self.x0 - radius, self.x0 + radius)

            theta = self.attack.gamma / self.size**2
            return at(self.bisect(at, 0.0, span, min(span * theta, theta))[1]), span

        def along(share: float) -> Array:
            return (1 - share) * self.x0 + share * x

        theta = self.attack.gamma / self.size**1.5
        return along(self.bisect(along, low, 1.0, theta)[1]), span

    def begin(self) -> tuple[Array, float]:
        for number in itertools.count():
            noise = self.draws(0, 1).uniform(1, *self.x0.shape, first=torch.tensor([number]), dtype=torch.float64)
            first: Array = noise[0, 0].numpy()
            if self.adversarial(first):
                break

        def blend(share: float) -> Array:
            return (1 - share) * self.x0 + share * first

        low, high = self.bisect(blend, 0.0, 1.0, 1e-3)
        return self.back(blend(high), low / high)

    def normal(self, x: Array, step: int, delta: float) -> Array:
        count = min(int(self.attack.samples * math.sqrt(step)), self.attack.max_samples)
        draws, first = self.draws(step - 1, 0), torch.zeros(1, dtype=torch.int64)
        if self.linf:
            noise = draws.uniform(count, *self.x0.shape, first=first, low=-1, dtype=torch.float64)[0].numpy()
        else:
            noise = draws.normal(count, *self.x0.shape, first=first, dtype=torch.float64)[0].numpy()
        noise = noise / np.sqrt((noise**2).sum((1, 2, 3), keepdims=True))
        probes = np.clip(x + delta * noise, 0, 1)
        noise = (probes - x) / delta
        signs = np.array([2.0 * self.adversarial(probe, kept=False) - 1 for probe in probes])
        if abs(signs.mean()) < 1:
            signs = signs - signs.mean()
        estimate = (signs[:, None, None, None] * noise).mean(0)
        return np.sign(estimate) if self.linf else estimate / np.sqrt((estimate**2).sum())

    def run(self) -> None:
        x, span = self.begin()
        for step in range(1, self.attack.steps + 1):
            delta = 0.1 if step == 1 else self.attack.gamma / self.size * span
            update = self.normal(x, step, delta)
            length = self.distance(x) / math.sqrt(step)
            while not self.adversarial(np.clip(x + length * update, 0, 1)):
                length /= 2
            x, span = self.back(np.clip(x + length * update, 0, 1))


@pytest.mark.parametrize("threat", [L2, LINF], ids=["l2", "linf"])
@pytest.mark.parametrize("settings", [{}, {"block": 5}, {"max_samples": 23}, {"gamma": 8.0}], ids=str)
def test_the_walk_is_the_papers(threat: ThreatModel, settings: dict[str, float]) -> None:
    attack = HopSkipJump(threat, 4, 20, seed=3, **settings)  # type: ignore[arg-type]
    model, x = Small(scale=4.0), images(4, 7)
    y, index = decided(model, x), torch.tensor([30, 2, 1000, 5])
    result = attack(QueryOracle(model, 4, chunk=50, known_right=True), x, y, index=index)
    for row in range(4):
        reference = Reference(attack, model, x[row], int(y[row]), int(index[row]))
        reference.run()
        assert int(result.queries[row] - result.checks[row]) == reference.queries
        assert float(result.distance[row]) == pytest.approx(reference.nearest, abs=1e-9)
    assert (result.iterations == 0).all()  # the noise itself lies within an unbounded ball
    assert (result.checks == 0).all()


@pytest.mark.parametrize(("norm", "steps", "factor"), [("l2", 16, 1.06), ("linf", 32, 1.07)])
def test_the_nearest_image_of_a_linear_classifier_is_found(norm: str, steps: int, factor: float) -> None:
    model, x, y, nearest = near_boundary(2, norm)
    result = HopSkipJump(ThreatModel(norm, "inf"), steps)(model, x, y)  # type: ignore[arg-type]
    assert (result.distance <= factor * nearest).all()
    assert (result.distance >= nearest * (1 - 1e-9)).all()
    for row in range(2):  # each hit kept is nearer than the one before
        assert (result.trace[result.trace[:, 0] == row][:, 3].diff() < 0).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_radius_beyond_the_nearest_image_is_won_and_one_below_is_not(norm: str) -> None:
    model, x, y, nearest = near_boundary(2, norm)
    wide = HopSkipJump(ThreatModel(norm, 1.25 * nearest))(model, x, y)  # type: ignore[arg-type]
    assert wide.success.all()
    assert torch.equal(wide.first_hit, wide.queries)
    assert (wide.queries < 3000).all()
    narrow = HopSkipJump(ThreatModel(norm, 0.95 * nearest), 8)(model, x, y)  # type: ignore[arg-type]
    assert not narrow.success.any()
    assert narrow.distance.isfinite().all()  # the nearest adversarial image outside


class Right(nn.Module):
    """Class 1 where the first value exceeds 0.6."""

    def forward(self, x: Tensor) -> Tensor:
        first = x.flatten(1)[:, 0]
        return torch.stack([0.6 - first, first - 0.6], 1)


def test_a_probe_within_the_radius_wins() -> None:
    x = torch.full((6, 1, 1, 2), 0.5, dtype=torch.float64)
    y, beside = torch.zeros(6, dtype=torch.int64), torch.tensor([0.9, 0.5], dtype=torch.float64).view(1, 1, 2)
    # bisected from 0.9 to 0.7, which lies outside the ball; of the probes 0.1 away some lie in it and are adversarial
    attack = HopSkipJump(ThreatModel("l2", 0.15), 1, 60, starts=lambda x0, y, target: beside.expand_as(x0))
    recording = Recording(Right())
    result = attack(QueryOracle(recording, 6, chunk=6 * 32, known_right=True), x, y)
    assert result.success.all()
    probes = next(given for given in recording.given if len(given) == 6 * 30).view(6, 30, 2)
    good = ((probes - 0.5).norm(dim=2) <= 0.15) & (probes[..., 0] > 0.6)
    assert torch.equal(result.first_hit, 3 + 1 + good.int().argmax(1))


def test_a_step_that_fails_is_halved_and_given_up() -> None:
    class Once(nn.Module):
        """Adversarial at the first question alone."""

        asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += 1
            return torch.tensor([[0.0, 2.0 if self.asked == 1 else -2.0]], dtype=x.dtype).repeat(len(x), 1)

    x, y = images(1, 3), torch.zeros(1, dtype=torch.int64)
    result = HopSkipJump(L2, 3, 6, search_steps=4)(QueryOracle(Once(), 1, known_right=True), x, y)
    # a try, the blend to 2^-10 and two halvings more to 192^-1.5, three estimates, and four lengths after each
    assert int(result.queries) == 1 + 10 + 2 + (6 + 8 + 10) + 3 * 4
    assert result.x_adv.isfinite().all()


class Watched(HopSkipJump):
    """Keeps the normals that it estimates."""

    def __init__(self, samples: int) -> None:
        super().__init__(L2, 1, samples)
        self.normals: list[Tensor] = []

    def _estimated(self, search: Search, state: HopSkipJumpState, rows: Tensor) -> None:
        super()._estimated(search, state, rows)
        self.normals.append(state.told[rows, 0])


def test_the_estimated_normal_improves_with_samples() -> None:
    model, x, y, _ = near_boundary(4, "l2")
    towards = (model.weight[1] - model.weight[0]).detach()
    cosines = []
    for samples in (10, 100, 1000):
        attack = Watched(samples)
        attack(model, x, y)
        normals = torch.cat(attack.normals).flatten(1)
        assert len(normals) == 4
        torch.testing.assert_close(normals.norm(dim=1), torch.ones(4, dtype=torch.float64))
        cosines.append((normals @ towards / towards.norm()).mean())
    assert 0 < cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] > 0.8


def test_labels_are_enough() -> None:
    model, x, y, nearest = near_boundary(3, "l2")

    class Labels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return decided(model, x)

    attack = HopSkipJump(ThreatModel("l2", 1.25 * nearest), seed=1)
    told = attack(QueryOracle(Labels(), 3, Access.LABEL, output="labels"), x, y)
    assert told.success.all()
    assert torch.equal(told.queries, attack(model, x, y).queries)


@pytest.mark.parametrize("tries", [1, 5, 16, 17, 200])
def test_no_beginning_is_an_honest_failure(tries: int) -> None:
    model, x, y = safe()
    result = HopSkipJump(L2, init_tries=tries)(model, x, y)
    assert not result.success.any()
    assert torch.equal(result.x_adv, x)
    assert (result.distance == math.inf).all()
    assert (result.queries - result.checks == tries).all()
    assert (result.checks == 1).all()  # the clean image of a bare call
    assert (result.iterations == 0).all()


def test_a_target_needs_an_image_of_its_class() -> None:
    model, x = Linear(3), images(4, 3)
    with torch.no_grad():
        model.bias[2] = -30.0
    y = decided(model, x)
    target = torch.full_like(y, 2)
    attack = HopSkipJump(L2, 10, init_tries=20)
    assert not attack(model, x, y, target).success.any()

    def starts(x0: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        weight = model.weight[target].detach()
        return (weight > model.weight.detach().mean(0)).to(x0.dtype).view_as(x0)

    given = HopSkipJump(L2, 10, init_tries=20, starts=starts)
    result = given(model, x, y, target)
    assert result.success.all()
    assert (decided(model, result.x_adv) == 2).all()
    assert (result.distance < given.threat.distance(starts(x, y, target), x)).all()


def test_images_to_begin_at_must_have_the_shape_of_the_others() -> None:
    model, x, y, _ = near_boundary(2, "l2")
    with pytest.raises(ValueError, match="starts must give one image for each"):
        HopSkipJump(L2, 1, starts=lambda x0, y, target: x0[:1])(model, x, y)


def test_answers_of_nan_are_left_out() -> None:
    inner, x, y, nearest = near_boundary(3, "l2")

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = inner(x)
            lost = (x.flatten(1).sum(1) * 1e4).floor() % 5 == 0
            return scores.masked_fill(lost[:, None], torch.nan)

    result = HopSkipJump(L2, 10)(Failing(), x, y)
    assert result.x_adv.isfinite().all()
    assert (result.distance < 2 * nearest).all()
    assert result.nonfinite > 0


def test_rows_that_wait_for_their_turn_find_the_same() -> None:
    model, x, y, _ = near_boundary(12, "l2")
    patient = HopSkipJump(L2, 2, 100, block=8)(QueryOracle(model, 12, chunk=1000), x, y)
    hasty = HopSkipJump(L2, 2, 100, block=8)(QueryOracle(model, 12, chunk=4), x, y)
    torch.testing.assert_close(patient.x_adv, hasty.x_adv, rtol=0, atol=1e-9)
    assert torch.equal(patient.queries, hasty.queries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threat": ThreatModel("l1", 1.0)}, "norm 'l1'"),
        ({"steps": 0}, "steps"),
        ({"samples": 0}, "samples"),
        ({"samples": 1.5}, "samples"),
        ({"max_samples": 0}, "max_samples"),
        ({"init_tries": 0}, "init_tries"),
        ({"search_steps": 0}, "search_steps"),
        ({"block": 0}, "block"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"gamma": math.inf}, "gamma"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HopSkipJump(**arguments)  # type: ignore[arg-type]
