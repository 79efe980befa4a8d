"""C1 by hand, counts of steps in closed form and by a plain loop, and ranks as thresholds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from contracts.nets import Linear, Small, images
from detectors.layered import Labelled, keyed
from torch import Tensor, nn

from lit_adv.detectors.turning_weakness import TurningWeakness, ranks

SHAPE = (1, 3, 3)


def linear(classes: int = 3, scale: float = 1.0, seed: int = 1) -> Linear:
    """Scores that are 0 in the middle of the box."""
    network = Linear(classes, SHAPE, seed)
    with torch.no_grad():
        network.weight.mul_(scale)
        network.bias.sub_(network.weight.sum(1) / 2)
    return network


class Asked(nn.Module):
    """Counts forwards of another network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.network(x)


def probabilities(network: Linear, x: np.ndarray) -> np.ndarray:
    scores = network.weight.detach().numpy() @ x + network.bias.detach().numpy()
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def steps_by_loop(network: Linear, x0: np.ndarray, goal: int, step_size: float, eps: float, most: int) -> int:
    """Steps until the decision changes: the gradient of the cross-entropy is W' (p - e_goal)."""
    weight, x = network.weight.detach().numpy(), x0.copy()
    label = int(probabilities(network, x).argmax())
    for number in range(1, most + 1):
        off = probabilities(network, x)
        off[goal] -= 1
        x = np.clip(x + step_size * (weight.T @ off), 0, 1)
        x = np.clip(x, x0 - eps, x0 + eps)
        if int(probabilities(network, x).argmax()) != label:
            return number
    return most


def test_statistics_by_hand() -> None:
    """All three of several images, from the same random numbers, in numpy."""
    network = linear(4)
    settings: dict[str, Any] = {"targeted_steps": 30, "untargeted_steps": 40, "untargeted_eps": 0.2}
    detector = TurningWeakness(network, sigma=0.3, untargeted_step_size=0.1, **settings)
    x = images(24, 3, SHAPE)
    found = detector.statistics(x, keyed(24)).numpy()
    draws = keyed(24)
    noise = draws.normal(*SHAPE, dtype=torch.float64).numpy()
    other = draws.integers(3, 1)[:, 0].tolist()
    for n in range(24):
        clean = x[n].numpy().ravel()
        p = probabilities(network, clean)
        label = int(p.argmax())
        target = [one for one in range(4) if one != label][other[n]]
        c1 = np.abs(probabilities(network, clean + 0.3 * noise[n].ravel()) - p).sum()
        assert found[n, 0] == pytest.approx(c1, rel=1e-9)
        assert found[n, 1] == steps_by_loop(network, clean, target, -0.05, 0.3, 30)
        assert found[n, 2] == steps_by_loop(network, clean, label, 0.1, 0.2, 40)
    for column in (1, 2):
        assert len(set(found[:, column])) > 3  # they are not all alike


def test_steps_in_closed_form() -> None:
    """A classifier so sharp that the target's gradient is constant: each step goes 0.04, and the boundary is at 0.5."""
    network = Linear(2, (1, 1, 1))
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[-2000.0], [2000.0]]))
        network.bias.copy_(torch.tensor([1000.0, -1000.0]))
    detector = TurningWeakness(network, targeted_step_size=1e-5, targeted_eps=0.3)
    x = torch.tensor([0.47, 0.43, 0.39, 0.21, 0.19, 0.53, 0.69, 0.81], dtype=torch.float64).view(-1, 1, 1, 1)
    found = detector.statistics(x, keyed(8))
    wanted = [math.floor(abs(0.5 - float(one)) / 0.04) + 1 if abs(0.5 - float(one)) < 0.3 else 200 for one in x]
    assert found[:, 1].tolist() == wanted  # beyond the ball's radius: all steps there are
    assert found[:, 2].tolist() == [1000.0] * 8  # the label's own gradient has vanished


def test_a_sure_classifier_still_has_a_gradient() -> None:
    """At a logit gap of 40 the usual form's p - 1 is 0 in float32; the gradient is exp(-40), and a large step goes."""
    network = linear(2).float()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[-100.0] + [0.0] * 8, [100.0] + [0.0] * 8]))
        network.bias.copy_(torch.tensor([50.0, -50.0]))
    x = torch.full((1, *SHAPE), 0.5)
    x[0, 0, 0, 0] = 0.3
    detector = TurningWeakness(network, untargeted_step_size=0.25 / 200 * math.exp(40))
    assert detector.statistics(x, keyed(1))[0, 2] == 1


def test_rows_that_stand_still_leave() -> None:
    network = linear(3)
    with torch.no_grad():
        network.weight.zero_()
    asked = Asked(network)
    found = TurningWeakness(asked).statistics(images(5, shape=SHAPE), keyed(5))
    assert found.tolist() == [[0, 200, 1000]] * 5
    assert asked.rows == 5 * 4


def test_rows_that_have_changed_leave() -> None:
    asked = Asked(linear(3))
    detector = TurningWeakness(asked, targeted_steps=30, untargeted_steps=50)
    found = detector.statistics(images(20, shape=SHAPE), keyed(20))
    # the image and its noisy copy; each step but the last is followed by a look
    steps = torch.minimum(found[:, 1:] + 1, torch.tensor([30.0, 50]))
    assert asked.rows <= 40 + int(steps.sum())


def test_rows_are_independent() -> None:
    detector = TurningWeakness(Small(4, SHAPE), targeted_steps=20, untargeted_steps=30)
    x = images(12, 2, SHAPE)
    together = detector.statistics(x, keyed(12))
    order = torch.randperm(12)
    torch.testing.assert_close(detector.statistics(x[order], keyed(12)[order]), together[order])
    for n in range(12):
        torch.testing.assert_close(detector.statistics(x[n : n + 1], keyed(1, n)), together[n : n + 1])
    assert detector.statistics(x[:0], keyed(0)).shape == (0, 3)


def test_two_classes_have_one_target_and_one_is_too_few() -> None:
    detector = TurningWeakness(linear(2), targeted_steps=5, untargeted_steps=5)
    assert detector.statistics(images(3, shape=SHAPE), keyed(3)).isfinite().all()
    with pytest.raises(ValueError, match="K >= 2"):
        TurningWeakness(linear(1)).statistics(images(3, shape=SHAPE), keyed(3))


def test_scores_sweep_the_rule_of_three_thresholds(generator: torch.Generator) -> None:
    """At least q exactly if any statistic exceeds the smallest value with a share q of clean ones at or below it."""
    clean = torch.randint(0, 8, (20, 3), generator=generator).double()  # many ties
    tested = torch.randint(-1, 9, (200, 3), generator=generator).double()
    score = ranks(tested, clean.sort(0).values).amax(1)
    for q in [count / 20 for count in range(1, 21)]:
        thresholds = [
            next(v for v in sorted(own) if sum(w <= v for w in own) >= 20 * q - 1e-9) for own in clean.T.tolist()
        ]
        for n in range(200):
            exceeds = any(float(tested[n, j]) > thresholds[j] for j in range(3))
            assert exceeds == (float(score[n]) >= q - 1e-9)


def fitted(**settings: Any) -> tuple[TurningWeakness, Labelled]:
    network = linear(3)
    x = images(40, 4, SHAPE)
    with torch.no_grad():
        label = network(x).argmax(1)
    detector = TurningWeakness(network, targeted_steps=20, untargeted_steps=20, **settings)
    return detector, Labelled(x, label)


def test_calibration_is_on_images_that_are_right() -> None:
    detector, given = fitted()
    wrong = given.label.clone()
    wrong[::4] = (wrong[::4] + 1) % 3
    detector.fit(Labelled(given.image, wrong), given.image[:0], given.image[:0])
    assert detector.calibrated.shape == (30, 3)
    rows = (wrong == given.label).nonzero()[:, 0]
    alone, _ = fitted()
    alone.fit(given, given.image[:0], given.image[:0])
    own = set(alone.calibrated[:, 0].tolist())
    assert set(detector.calibrated[:, 0].tolist()) < own  # an image's random numbers go by its place
    assert len(rows) == 30
    few, _ = fitted(calibration=7)
    few.fit(given)
    assert few.calibrated.shape == (7, 3)


def test_score_state_and_modes() -> None:
    detector, given = fitted()
    x = images(6, 9, SHAPE)
    with pytest.raises(ValueError, match="has learnt nothing yet"):
        detector.score(x)
    detector.fit(given)
    found = detector.score(x, keyed(6))
    assert found.dtype == torch.float64
    assert bool(((found >= 0) & (found <= 1)).all())
    other, _ = fitted()
    other.load_state_dict(detector.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(other.score(x.clone(), keyed(6)), found)
    torch.manual_seed(3)
    free = detector.score(x)
    torch.manual_seed(3)
    torch.testing.assert_close(detector.score(x), free)
    assert all(p.grad is None and not p.requires_grad for p in detector.parameters())
    assert bool((detector.score(torch.cat([torch.zeros_like(x), torch.ones_like(x)])) >= 0).all())


def test_a_network_in_half_precision() -> None:
    network = Small(3, SHAPE).bfloat16()
    detector = TurningWeakness(network, targeted_steps=5, untargeted_steps=5)
    assert detector.statistics(images(4, shape=SHAPE, dtype=torch.float32), keyed(4)).isfinite().all()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda y: (y + 1) % 3, "gets none of the 40 training images right"),
        (lambda y: y[:5], "one class index per image"),
        (lambda y: y.double(), "one class index per image"),
    ],
)
def test_what_nothing_can_be_learnt_from(label: Any, message: str) -> None:
    detector, given = fitted()
    with pytest.raises(ValueError, match=message):
        detector.fit(Labelled(given.image, label(given.label)))
    broken = given.image.clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        detector.fit(Labelled(broken, given.label))


@pytest.mark.parametrize(
    "given",
    [
        {"sigma": 0.0},
        {"targeted_step_size": -1.0},
        {"targeted_eps": math.nan},
        {"untargeted_step_size": math.inf},
        {"untargeted_eps": 0.0},
        {"targeted_steps": 0},
        {"untargeted_steps": 2.5},
        {"calibration": 0},
    ],
)
def test_bad_arguments_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        TurningWeakness(linear(), **given)
