"""Gradients for white-box attacks against autograd on the bare model, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Noisy, Small, decided, images
from torch import Tensor, nn

from lit_adv.attack import Attack
from lit_adv.attacks import APGD, DDN, FAB, PGD, CarliniWagner, DeepFool
from lit_adv.defense import Defense
from lit_adv.differentiable import products
from lit_adv.estimators import Autograd
from lit_adv.gradients import clean_scores, gradient_of, gradients_of
from lit_adv.losses import Combined, cross_entropy, detector_margin
from lit_adv.oracle import Access, AccessDenied, QueryOracle
from lit_adv.result import BAD_GRADIENT, ZERO_GRADIENT
from lit_adv.search import Search
from lit_adv.state import State
from lit_adv.threat import ThreatModel


def begun(model: nn.Module, count: int = 5, **oracle: object) -> tuple[Search, State, Tensor, Tensor]:
    x = images(count)
    y = torch.zeros(count, dtype=torch.int64)
    asked = QueryOracle(model, count, **oracle)  # type: ignore[arg-type]
    search = Search(PGD(), asked, x, y, None, torch.arange(count))
    return search, State(**search.fresh(torch.arange(count))), x, y


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Of all scores by all pixels, image by image: (n, K, C, H, W)."""
    return torch.stack([torch.autograd.functional.jacobian(lambda v: model(v[None])[0], image) for image in x])


@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("batched", [False, True])
def test_sums_of_scores_have_their_gradients(chunk: int, batched: bool) -> None:
    model, x = Small(), images(5)
    weights = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    oracle = QueryOracle(model, 5, chunk=chunk)
    scores, found = products(oracle, x.unsqueeze(1), None, lambda scores, rows: weights[rows], batched)
    torch.testing.assert_close(scores[:, 0], model(x).detach())
    torch.testing.assert_close(found, torch.einsum("nkj,njchw->nkchw", weights, jacobian(model, x)))


def test_what_knows_no_batches_of_gradients_goes_one_by_one() -> None:
    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * float(grad.abs().max() >= 0)

    class Net(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Stubborn.apply(x))

    x = images(3)
    unit = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    _, found = products(QueryOracle(Net(), 3), x.unsqueeze(1), None, lambda scores, rows: unit[rows], True)
    torch.testing.assert_close(found, jacobian(Small(), x))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_mean_over_draws_does_not_depend_on_the_chunk(chunk: int) -> None:
    found = []
    for size in (chunk, 1000):
        search, state, _, y = begun(Noisy(Small(), 4), chunk=size)
        value, gradient, scores = gradient_of(search, state, lambda s, y=y: cross_entropy(s, y), eot=7)
        assert scores.shape == (5, 7, 4)
        unit = torch.eye(4, dtype=torch.float64).expand(5, 4, 4)
        _, several = gradients_of(search, state, lambda s, rows, unit=unit: unit[rows], eot=7)
        asked = search.oracle.queries - search.checks
        assert asked.tolist() == [14] * 5
        found.append((value, gradient, several))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_draws_are_averaged() -> None:
    model = Noisy(Small(), 4)
    search, state, x, y = begun(model)
    value, gradient, _ = gradient_of(search, state, lambda s: cross_entropy(s, y), eot=3)
    noise = [part.clone() for part in model.seen]
    assert sum(len(part) for part in noise) >= 15
    single = []
    for number in range(3):
        other, _, _, _ = begun(model)
        other.oracle.queries += number
        single.append(gradient_of(other, state, lambda s: cross_entropy(s, y))[:2])
    torch.testing.assert_close(value, torch.stack([v for v, _ in single]).mean(0))
    torch.testing.assert_close(gradient, torch.stack([g for _, g in single]).mean(0))
    assert x.grad is None


def test_clean_scores_are_asked_once_and_only_where_a_step_follows() -> None:
    model = Counting(Small(), images(5))
    search, _, x, _ = begun(model, budget=3)
    rows = torch.tensor([3, 1])
    torch.testing.assert_close(clean_scores(search, rows), Small()(x[rows]).detach())
    clean_scores(search, torch.tensor([1, 0]))
    assert model.seen.tolist() == [1, 1, 0, 1, 0] == search.checks.tolist()
    assert clean_scores(search, torch.tensor([2]), more=3).isnan().all()
    assert model.seen.sum() == 3


def test_gradients_that_lead_nowhere_are_counted_and_told() -> None:
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            bad = torch.where(flat[:, :1] > 0.5, torch.nan, 0.0)
            return torch.cat([0 * flat[:, :3] + 1, flat[:, :1].detach()], 1) + bad.detach() * 0

    x = images(6)
    with pytest.warns(UserWarning, match="exactly 0 or not finite for 6 of 6 images of Dead"):
        result = PGD(steps=2, random_start=False)(Dead().eval(), 0.4 * x, torch.zeros(6, dtype=torch.int64))
    assert result.counts[ZERO_GRADIENT] == (12, 12)
    assert result.counts[BAD_GRADIENT] == (0, 12)


def test_a_random_model_is_averaged_unless_said_otherwise() -> None:
    model = Noisy(Small(), 4).eval()
    x = images(3)
    y = decided(Small(), x)
    free = PGD(ThreatModel(eps=1e-6), steps=2, random_start=False)(QueryOracle(model, 3, known_right=True), x, y)
    assert ((free.queries - free.checks) == 40).all()
    with pytest.warns(UserWarning, match="Noisy is random, and PGD with eot=1"):
        one = PGD(ThreatModel(eps=1e-6), steps=2, random_start=False, estimator=Autograd(1))(
            QueryOracle(model, 3, known_right=True), x, y
        )
    assert ((one.queries - one.checks) == 2).all()


def test_a_part_of_the_model_may_lend_its_gradient() -> None:
    class Rounded(Defense):
        num_classes = 4

        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(Small())

        def forward(self, x: Tensor) -> Tensor:
            return self.inside((x * 4).round() / 4)

    x = images(4)
    y = decided(Small(), x)
    for name in ("inside", "inside.0"):
        search, state, *_ = begun(Rounded(), 4, surrogate=name)
        _, gradient, _ = gradient_of(search, state, lambda s: cross_entropy(s, y))
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(cross_entropy(Small()(leaf), y).sum(), leaf)
        torch.testing.assert_close(gradient, expected)
    with pytest.raises(ValueError, match=r"Rounded has no 'inside\.7'"):
        QueryOracle(Rounded(), 4, surrogate="inside.7")


def test_a_deterministic_part_of_a_random_model_needs_no_draws() -> None:
    model = Noisy(Small(), 4)
    search, state, x, y = begun(model, surrogate="model")
    _, gradient, _ = gradient_of(search, state, lambda s: cross_entropy(s, y))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(Small()(leaf), y).sum(), leaf)
    torch.testing.assert_close(gradient, expected)


def test_parts_of_an_oracle_go_on_with_its_accounts() -> None:
    oracle = QueryOracle(Small(), 4, budget=5, index=torch.tensor([9, 8, 7, 6]))
    oracle.scores(images(4), torch.arange(4))
    rows = torch.tensor([3, 1])
    part = oracle.part(rows)
    assert part.queries.tolist() == [1, 1]
    assert part.index.tolist() == [6, 8]
    part.scores(images(2)[:, None].repeat(1, 4, 1, 1, 1), torch.arange(2))
    assert oracle.queries.tolist() == [1, 1, 1, 1]
    oracle.settle(rows, part)
    assert oracle.queries.tolist() == [1, 5, 1, 5]


def test_jacobians_need_access() -> None:
    oracle = QueryOracle(Small(), 2, Access.LOGITS)
    with pytest.raises(AccessDenied, match="GRADIENT"):
        oracle.jacobian(images(2)[:, None], torch.arange(2), lambda scores, rows: scores[:, None])
    assert not oracle.queries.any()


def test_the_combined_loss_is_the_paper_s() -> None:
    scores = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    m = scores[:, 4] - scores[:, :4].max(1).values
    torch.testing.assert_close(detector_margin(scores, 4), m)
    expected = nn.functional.cross_entropy(scores[:, :4], y, reduction="none") - 3 * (1 + m.exp()).log()
    torch.testing.assert_close(Combined(3.0)(scores, y, None, 4), expected)
    torch.testing.assert_close(Combined(3.0)(scores[:, :4], y), cross_entropy(scores[:, :4], y))
    with pytest.raises(ValueError, match="beta must be a weight >= 0, got -1"):
        Combined(-1)


@pytest.mark.parametrize("attack", [PGD(steps=3), APGD(steps=3, targets=2), FAB(steps=3), DeepFool(), CarliniWagner(
    iterations=6, search_steps=2, beta=1.0), DDN(steps=5)], ids=lambda attack: type(attack).__name__)  # fmt: skip
def test_the_classifier_inside_a_detector_is_attacked_and_the_whole_judges(attack: Attack) -> None:
    class Detector(Defense):
        num_classes, reject = 4, 4

        def __init__(self) -> None:
            super().__init__()
            self.classifier = Small(scale=4.0)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.classifier(x)
            suspect = (x.flatten(1).std(1, keepdim=True) - 0.3) * 20
            return torch.cat([logits, logits.amax(1, keepdim=True) + suspect], 1)

    model, x = Detector().eval(), images(10)
    y = decided(Small(scale=4.0), x)
    found = attack(QueryOracle(model, 10, surrogate="classifier"), x, y)
    label = model(found.x_adv).argmax(1)
    assert ((label != y) & (label != 4))[found.success].all()
    assert found.x_adv.isfinite().all()


def test_gradients_cost_one_query_however_many_answers_scores_take() -> None:
    model = Noisy(Small(), 4, 0.01).eval()
    x = images(3)
    oracle = QueryOracle(model, 3, budget=50, answers=3, known_right=True)
    found = PGD(ThreatModel(eps=1e-6), steps=5, random_start=False)(oracle, x, decided(Small(), x))
    assert found.queries.tolist() == [43] * 3  # two steps of 20 draws, and three answers at the end


def test_training_on_a_model_without_a_gradient_is_refused_in_words() -> None:
    class Blind(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    x = images(3)
    with pytest.raises(ValueError, match="Blind gives answers without a gradient with respect to the 3 images"):
        PGD(steps=2).perturb(Blind().eval(), x, decided(Small(), x))
