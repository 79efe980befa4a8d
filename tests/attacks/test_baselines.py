"""Attacks that ask nothing: random noise, and the difference of class means."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Counting, Linear, Small, decided, images, safe
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack
from lit_adv.attacks import DifferenceOfMeans, RandomNoise
from lit_adv.attacks.baselines import class_means, nearest_class
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")

BALL = ThreatModel("linf", 0.1)
ROUND = ThreatModel("l2", 0.5)


def taught(threat: ThreatModel = BALL, classes: int = 4, **settings: Any) -> DifferenceOfMeans:
    attack = DifferenceOfMeans(threat, **settings)
    attack.fit(images(60, 3), torch.arange(60) % classes)
    return attack


def run(attack: IterativeAttack, x: Tensor, y: Tensor, model: nn.Module | None = None, **more: Any) -> Tensor:
    model = model or safe(count=len(x))[0]
    return attack(QueryOracle(model, len(x), known_right=True), x, y, **more).x_adv


def middle(count: int, seed: int = 0) -> Tensor:
    """Images so far from the edge of the box that nothing is cut."""
    return 0.3 + 0.4 * images(count, seed)


# noise


def test_noise_moves_every_element_by_the_whole_radius() -> None:
    x, y = middle(200), torch.zeros(200, dtype=torch.int64)
    moved = run(RandomNoise(BALL), x, y) - x
    torch.testing.assert_close(moved.abs(), torch.full_like(x, 0.1))
    assert abs(float((moved > 0).double().mean()) - 0.5) < 4.5 * 0.5 / math.sqrt(moved.numel())
    assert len({tuple(row.sign().tolist()) for row in moved.flatten(1)}) == 200


def test_round_noise_is_a_random_direction_of_the_whole_radius() -> None:
    x, y = middle(400), torch.zeros(400, dtype=torch.int64)
    moved = (run(RandomNoise(ROUND), x, y) - x).flatten(1)
    torch.testing.assert_close(moved.norm(dim=1), torch.full((400,), 0.5, dtype=torch.float64))
    assert float(moved.mean(0).norm()) < 3 * 0.5 / math.sqrt(400)


def test_noise_depends_on_seed_and_image() -> None:
    x, y = middle(3), torch.zeros(3, dtype=torch.int64)
    first = run(RandomNoise(BALL), x, y)
    assert torch.equal(first, run(RandomNoise(BALL), x, y))
    assert not torch.equal(first, run(RandomNoise(BALL, seed=1), x, y))
    assert torch.equal(first[2:], run(RandomNoise(BALL), x[2:], y[2:], index=torch.tensor([2])))


def test_what_leaves_the_box_is_cut() -> None:
    x, y = images(5).round(), torch.zeros(5, dtype=torch.int64)
    for attack in (RandomNoise(BALL), taught(noise=0.05), RandomNoise(ROUND), taught(ROUND)):
        x_adv = run(attack, x, y)
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert attack.threat.within(x_adv, x).all()


# means


def test_means_are_those_of_a_plain_loop() -> None:
    x, y = images(50, 1), torch.arange(50) % 3 * 2
    found = class_means(x, y)
    assert found["images"].tolist() == [17, 0, 17, 0, 16]
    for label in (0, 2, 4):
        torch.testing.assert_close(found["means"][label], x[y == label].mean(0))


def test_the_nearest_class_is_the_l2_argmin_over_the_others() -> None:
    means = images(7, 2)
    present = torch.tensor([True, True, False, True, True, False, True])
    found = nearest_class(means, present)
    for label in range(7):
        others = {k: float((means[k] - means[label]).norm()) for k in range(7) if k != label and present[k]}
        assert int(found[label]) == min(others, key=lambda k: others[k])


@pytest.mark.parametrize("threat", [BALL, ROUND])
def test_the_step_leads_from_mean_to_mean(threat: ThreatModel) -> None:
    train, labels = images(60, 3), torch.arange(60) % 4
    means = torch.stack([train[labels == k].mean(0) for k in range(4)])
    x, y = middle(8), torch.arange(8) % 4
    target = (y + 2) % 4
    for given in (None, target):
        x_adv = run(taught(threat), x, y, target=given)
        for row in range(8):
            source = int(y[row])
            others = [k for k in range(4) if k != source]
            nearest = min(others, key=lambda k: float((means[k] - means[source]).norm()))
            delta = means[nearest if given is None else int(target[row])] - means[source]
            step = 0.1 * delta.sign() if threat is BALL else 0.5 * delta / delta.norm()
            torch.testing.assert_close(x_adv[row] - x[row], step)


def test_two_classes_swap_roles() -> None:
    x = middle(1).expand(2, -1, -1, -1)
    x_adv = run(taught(classes=2), x, torch.tensor([0, 1]))
    torch.testing.assert_close(x_adv[0] - x[0], x[1] - x_adv[1])


def test_elements_in_which_the_means_agree_do_not_move() -> None:
    train = images(40, 3)
    train[:, 0], train[:, 1, :4] = 0.0, 0.25
    attack = DifferenceOfMeans(BALL)
    attack.fit(train, torch.arange(40) % 4)
    x, y = middle(4), torch.arange(4)
    moved = (run(attack, x, y) - x).abs()
    assert (moved[:, 0] == 0).all()
    assert (moved[:, 1, :4] == 0).all()
    torch.testing.assert_close(moved[:, 2], torch.full_like(moved[:, 2], 0.1))


def test_equal_means_do_not_move_at_all() -> None:
    train = images(10, 3).repeat(2, 1, 1, 1)
    for threat in (BALL, ROUND):
        attack = DifferenceOfMeans(threat)
        attack.fit(train, torch.arange(20) // 10)
        x = middle(2)
        assert torch.equal(run(attack, x, torch.tensor([0, 1])), x)


def test_noise_comes_first_and_leaves_the_rest_of_the_radius() -> None:
    x, y = middle(50), torch.arange(50) % 4
    steps = run(taught(), x, y) - x
    moved = run(taught(noise=0.03), x, y) - x
    expected = torch.tensor([0.04, 0.1], dtype=torch.float64)
    along = moved * steps.sign()
    assert torch.minimum((along - expected[0]).abs(), (along - expected[1]).abs()).max() < 1e-12
    assert torch.equal(run(taught(noise=0.1), x, y), run(RandomNoise(BALL), x, y))


# queries


@pytest.mark.parametrize("make", [lambda: RandomNoise(BALL), taught])
@pytest.mark.parametrize(("known_right", "checks"), [(True, 1), (False, 2)])
def test_they_cost_nothing_but_checks(make: Callable[[], IterativeAttack], known_right: bool, checks: int) -> None:
    inner, x, y = safe(count=5)
    model = Counting(inner, x)
    result = make()(QueryOracle(model, 5, Access.LABEL, known_right=known_right), x, y)
    assert result.queries.tolist() == result.checks.tolist() == model.seen.tolist() == [checks] * 5
    assert not result.success.any()
    assert result.iterations.tolist() == [1] * 5


@pytest.mark.parametrize(("budget", "spent"), [(0, 0), (1, 1), (5, 1)])
def test_without_a_query_left_nothing_is_claimed(budget: int, spent: int) -> None:
    model, x, y = mixture()
    attack = DifferenceOfMeans(BALL)
    attack.fit(x, y)
    result = attack(QueryOracle(model, len(x), budget=budget, known_right=True), x, y)
    assert (result.queries == spent).all()
    assert (result.success == bool(budget)).all()


def test_an_image_that_is_wrong_already_stays_where_it_is() -> None:
    model, x = Small(), middle(6)
    wrong = (decided(model, x) + 1) % 4
    result = taught()(model, x, wrong)
    assert result.success.all()
    assert (result.distance == 0).all()
    assert result.queries.tolist() == [1] * 6
    assert (taught(stop_at_hit=False)(model, x, wrong).distance > 0).any()


def mixture() -> tuple[nn.Module, Tensor, Tensor]:
    """Two Gaussian classes, 200 images, and the linear classifier between them."""
    generator = torch.Generator().manual_seed(0)
    centre = 0.5 + 0.05 * torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.arange(200) % 2
    x = (centre[y] + 0.02 * torch.randn(200, 3, 8, 8, generator=generator, dtype=torch.float64)).clamp(0, 1)
    model = Linear(2)
    with torch.no_grad():
        model.weight.copy_(centre.flatten(1))
        model.bias.copy_(-0.5 * (model.weight**2).sum(1))
    assert torch.equal(decided(model, x), y)
    return model, x, y


def test_where_noise_is_lost_the_difference_of_the_means_wins() -> None:
    model, x, y = mixture()
    attack = DifferenceOfMeans(BALL)
    attack.fit(x[:100], y[:100])
    assert attack(model, x[100:], y[100:]).success.all()
    assert not RandomNoise(BALL)(model, x[100:], y[100:]).success.any()


# files and refusals


def test_the_means_are_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "means.safetensors"
    train, labels, x, y = images(60, 3), torch.arange(60) % 4, middle(4), torch.arange(4)
    first = DifferenceOfMeans(BALL)
    assert first.needs_fit
    assert first.fitted_on == ""
    first.fit(train, labels, path)
    read = DifferenceOfMeans(BALL, path=path)
    assert not read.needs_fit
    assert read.fitted_on == first.fitted_on != ""
    assert torch.equal(run(read, x, y), run(first, x, y))
    other = DifferenceOfMeans(BALL)
    other.fit(train, labels.flip(0), path)
    assert other.fitted_on != first.fitted_on
    assert not torch.equal(run(other, x, y), run(first, x, y))


def of_two_classes() -> DifferenceOfMeans:
    attack = DifferenceOfMeans(BALL)
    attack.fit(images(40, 3), torch.arange(40) % 2 * 2)
    return attack


LABELS = torch.tensor([0, 2, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomNoise(ThreatModel("l1", 1.0)), "RandomNoise has rules for linf and l2, got norm 'l1'"),
        (lambda: DifferenceOfMeans(ThreatModel("l0", 1.0)), "DifferenceOfMeans has rules for linf and l2"),
        (lambda: RandomNoise(ThreatModel("linf", "inf")), "eps must be finite"),
        (lambda: DifferenceOfMeans(ThreatModel("l2", "inf")), "eps must be finite"),
        (lambda: DifferenceOfMeans(BALL, noise=0.2), "noise must lie between 0 and the radius, 0.1, got 0.2"),
        (lambda: DifferenceOfMeans(BALL, noise=-0.1), "noise must lie between 0"),
        (lambda: DifferenceOfMeans(BALL, noise=math.nan), "noise must lie between 0"),
        (lambda: DifferenceOfMeans(BALL, path=Path("nowhere")), "path must be a safetensors file"),
        (lambda: run(DifferenceOfMeans(BALL), images(3), LABELS), r"call attack.fit\(images, labels\)"),
        (lambda: run(of_two_classes(), images(3), LABELS + 1), "y holds class 1, of which the training images held"),
        (lambda: run(of_two_classes(), images(3), LABELS + 3), "y holds class 3"),
        (lambda: run(of_two_classes(), images(3), LABELS, target=2 - LABELS + LABELS // 2), "target holds class 1"),
        (lambda: run(of_two_classes(), images(3, shape=(1, 8, 8)), LABELS), r"images \(3, 8, 8\), but the images"),
        (lambda: taught().fit(images(3), torch.tensor([0, 1])), "labels must hold one class index per image"),
        (lambda: taught().fit(images(3), torch.tensor([0, 1, -1])), "negative class -1"),
        (lambda: taught().fit(images(3), torch.tensor([2, 2, 2])), "at least two classes, got only class 2"),
        (lambda: taught().fit(images(0), torch.zeros(0, dtype=torch.int64)), "images to learn from"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_file({"components": torch.zeros(2, 3, 8, 8)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"path must hold class means \(K, C, H, W\), got \['components'\]"):
        DifferenceOfMeans(BALL, path=tmp_path / "other")


def test_a_threat_model_is_asked_for() -> None:
    with pytest.raises(TypeError, match="threat must be a ThreatModel"):
        RandomNoise(0.3)  # type: ignore[arg-type]
