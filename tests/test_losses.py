"""Losses against formulas written out class by class in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_adv.losses import (
    Loss,
    adversarial_samples,
    cross_entropy,
    dlr,
    hinge,
    is_adversarial,
    margin,
    margin_to,
    probability,
    rival,
)

LOSSES: list[Loss] = [cross_entropy, margin, hinge, dlr]


def case(count: int = 12, columns: int = 6, samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, columns) if samples is None else (count, samples, columns)
    scores = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (count,), generator=generator)
    return scores, y, (y + 1 + torch.randint(0, 4, (count,), generator=generator)) % 5


def by_hand(name: str, row: list[float], y: int, target: int | None, reject: int | None) -> float:
    """The loss of one row of scores, from its definition."""
    own = {y if target is None else target}
    if target is None and reject is not None:
        own.add(reject)
    others = [value for place, value in enumerate(row) if place not in own]
    mine = [row[place] for place in own]
    ordered = sorted(row, reverse=True)
    if name == "cross_entropy":
        share = sum(math.exp(value) for value in mine) / sum(math.exp(value) for value in row)
        return -math.log(share) if target is None else math.log(share)
    if name == "margin":
        return max(others) - max(mine) if target is None else max(mine) - max(others)
    if name == "hinge":
        return min(by_hand("margin", row, y, target, reject), 0)
    if target is None:
        return (max(others) - max(mine)) / (ordered[0] - ordered[2])
    right = row[y] if reject is None else max(row[y], row[reject])
    return (row[target] - right) / (ordered[0] - (ordered[2] + ordered[3]) / 2)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("reject", [None, 5])
def test_values_agree_with_the_definitions(loss: Loss, targeted: bool, reject: int | None) -> None:
    scores, y, target = case()
    value = loss(scores, y, target if targeted else None, reject)
    for i, row in enumerate(scores.tolist()):
        goal = int(target[i]) if targeted else None
        assert float(value[i]) == pytest.approx(by_hand(loss.__name__, row, int(y[i]), goal, reject), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("reject", [None, 5])
def test_samples_are_judged_one_by_one(loss: Loss, targeted: bool, reject: int | None) -> None:
    scores, y, target = case(samples=4)
    goal = target if targeted else None
    single = torch.stack([loss(scores[:, s], y, goal, reject) for s in range(4)], 1)
    torch.testing.assert_close(loss(scores, y, goal, reject), single, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("reject", [None, 5])
def test_margin_is_positive_exactly_when_the_attacker_has_won(targeted: bool, reject: int | None) -> None:
    scores, y, target = case(500)
    goal = target if targeted else None
    won = is_adversarial(scores.argmax(-1), y, goal, reject)
    assert torch.equal(margin(scores, y, goal, reject) > 0, won)
    assert torch.equal(hinge(scores, y, goal, reject) == 0, won)
    assert 0 < won.sum() < 500


def test_a_refusal_is_no_win() -> None:
    label, y, target = torch.tensor([0, 1, 5]), torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])
    assert is_adversarial(label, y).tolist() == [False, True, True]
    assert is_adversarial(label, y, None, 5).tolist() == [False, True, False]
    assert is_adversarial(label, y, target, 5).tolist() == [False, True, False]
    assert is_adversarial(label[:, None].expand(3, 2), y, None, 5).tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_refused_images_have_negative_margin_and_the_refusal_is_pushed_down() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0, 5.0]], requires_grad=True)
    y = torch.tensor([0])
    assert float(margin(scores, y, None, 3).detach()) == -3
    (gradient,) = torch.autograd.grad(margin(scores, y, None, 3).sum(), scores)
    assert gradient.tolist() == [[0, 1, 0, -1]]
    (gradient,) = torch.autograd.grad(cross_entropy(scores, y, None, 3).sum(), scores)
    assert gradient[0, 3] < 0
    assert gradient[0, 1] > 0


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("gap", [20.0, 60.0, 80.0])
def test_the_gradient_survives_a_sure_network_in_float32(loss: Loss, targeted: bool, gap: float) -> None:
    scores = torch.tensor([[gap, 0.0, -1.0, -2.0, -3.0]], requires_grad=True)
    y, target = torch.tensor([0]), torch.tensor([1])
    (gradient,) = torch.autograd.grad(loss(scores, y, target if targeted else None, None).sum(), scores)
    assert gradient.isfinite().all()
    assert gradient[0, 1] > 0
    assert gradient[0, 0] < 0
    if loss is cross_entropy and not targeted:  # d/dz = softmax - onehot: exp(-gap) over the others
        others = torch.tensor([0.0, -1, -2, -3], dtype=torch.float64) - gap
        expected = others.exp() / (1 + others.exp().sum())
        torch.testing.assert_close(gradient[0, 1:].double(), expected, rtol=1e-4, atol=0)


def test_large_scores_do_not_overflow() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0, 5.0]], requires_grad=True)
    for target in (None, torch.tensor([1])):
        value = cross_entropy(scores, torch.tensor([0]), target)
        (gradient,) = torch.autograd.grad(value.sum(), scores)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_log_probabilities_of_minus_infinity_are_borne() -> None:
    scores = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert margin(scores, torch.tensor([1])).tolist() == [math.inf]
    assert hinge(scores, torch.tensor([1])).tolist() == [0]


def test_two_classes() -> None:
    scores = torch.tensor([[0.3, -0.5]], dtype=torch.float64)
    assert float(margin(scores, torch.tensor([0]))) == pytest.approx(-0.8)
    assert float(cross_entropy(scores, torch.tensor([0]))) == pytest.approx(math.log1p(math.exp(-0.8)))


def test_dlr_knows_neither_shift_nor_scale() -> None:
    scores, y, target = case(columns=5)
    for goal in (None, target):
        torch.testing.assert_close(dlr(7 * scores - 3, y, goal), dlr(scores, y, goal))


def test_dlr_needs_enough_classes() -> None:
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        dlr(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1]))


def test_dlr_of_equal_scores_is_finite() -> None:
    scores = torch.zeros(1, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(dlr(scores, torch.tensor([0])).sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows(loss: Loss) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert loss(torch.zeros(0, 5), none, None, None).shape == (0,)
    assert loss(torch.zeros(0, 3, 5), none, None, None).shape == (0, 3)


def test_probability_is_the_softmax_of_the_true_class() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.5], [3.0, -1.0, 0.0]], dtype=torch.float64)
    y, target = torch.tensor([1, 0]), torch.tensor([2, 2])
    exact = scores.exp() / scores.exp().sum(1, keepdim=True)
    torch.testing.assert_close(probability(scores, y), -exact[[0, 1], y])
    torch.testing.assert_close(probability(scores, y, target), exact[[0, 1], target])
    torch.testing.assert_close(probability(scores, y, None, 2), -(exact[[0, 1], y] + exact[:, 2]))
    sure = torch.tensor([[60.0, 0.0, 0.0]])
    assert probability(sure, torch.tensor([0])) == -1
    assert cross_entropy(sure, torch.tensor([0])) > 0


def test_a_margin_to_the_rival_is_the_margin_at_the_point_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (20,), generator=generator)
    for target in (None, (y + 1) % 4):
        for reject in (None, 4):
            best = rival(scores, y, target, reject)
            torch.testing.assert_close(margin_to(best, scores, y, target, reject), margin(scores, y, target, reject))
            assert bool((best != (y if target is None else target)).all())
    samples = torch.stack([scores, scores.flip(1)], 1)
    assert margin_to(rival(scores, y), samples, y).shape == (20, 2)


def test_draws_of_one_image_are_judged_by_their_mean_probabilities() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = 3 * torch.randn(400, 5, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (400,), generator=generator)
    by_hand = scores.exp().div(scores.exp().sum(-1, keepdim=True)).mean(1).argmax(1) != y
    single = adversarial_samples(scores, y, None)
    assert single is not None
    assert torch.equal(single, scores.argmax(-1) != y[:, None])
    averaged = adversarial_samples(scores, y, None, averaged=True)
    assert averaged is not None
    assert torch.equal(averaged[:, -1], by_hand)
    assert not averaged[:, :-1].any()
    assert int((single.any(1) & ~by_hand).sum()) > 0  # one wrong draw alone is no hit
    assert adversarial_samples(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([0]), None, averaged=True) is None
    split = torch.tensor([[[0.51, 0.49, 1e-9], [1e-9, 0.49, 0.51]]]).log()  # each draw errs elsewhere
    aimed = adversarial_samples(split, torch.tensor([0]), torch.tensor([1]), averaged=True)
    assert aimed is not None
    assert aimed.tolist() == [[False, True]]
    lost = scores[:1].clone()
    lost[0, 2] = torch.nan
    assert adversarial_samples(lost, y[:1], None, averaged=True) is None
