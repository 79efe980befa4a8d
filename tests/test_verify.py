"""verify: judged by the bare model alone; whatever is doubtful is not verified."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.nets import Linear, Noisy, Small, decided, images, near_boundary
from torch import Tensor, nn

from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.threat import ThreatModel
from lit_adv.verify import correct, fresh_labels, verify

THREAT = ThreatModel("linf", 0.1)


def broken(eps: float = 0.1) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model, images, labels and adversarial images at linf distance ``eps``, all verified by hand."""
    model, x0, y, distance = near_boundary(5, "linf")
    assert distance < 0.1
    w = (model.weight[1] - model.weight[0]).detach().view(1, 3, 8, 8)
    return model, x0, y, x0 + eps * w.sign()


def test_adversarial_images_in_the_ball_are_verified() -> None:
    model, x0, y, x_adv = broken()
    seen = verify(model, THREAT, x_adv, x0, y)
    assert seen.verified.all()
    assert seen.any.all()
    assert (seen.mean == 1).all()
    assert torch.equal(seen.label, decided(model, x_adv))


def test_clean_images_are_not() -> None:
    model, x0, y, _ = broken()
    seen = verify(model, THREAT, x0, x0, y)
    assert not seen.verified.any()
    assert not seen.any.any()
    assert not seen.rounded.any()
    assert torch.equal(seen.label, y)


def test_each_condition_by_itself() -> None:
    model, x0, y, x_adv = broken()
    outside, beyond, nan = x_adv.clone(), x_adv.clone(), x_adv.clone()
    outside[0] = x0[0] + 1.01 * (x_adv[0] - x0[0])
    beyond[1, 0, 0, 0] = 1.01
    nan[2, 1, 3, 3] = math.nan
    infinite = x_adv.clone()
    infinite[3, 0, 0, 0] = -math.inf
    for i, candidate in enumerate((outside, beyond, nan, infinite)):
        seen = verify(model, ThreatModel("linf", 0.1) if i != 1 else ThreatModel("linf", 1.0), candidate, x0, y)
        expected = [j != i for j in range(5)]
        assert seen.verified.tolist() == expected
        assert seen.any.tolist() == expected
        assert (seen.mean > 0).tolist() == expected
        assert seen.rounded.tolist() == expected
    right = torch.where(torch.arange(5) == 4, decided(model, x_adv), y)
    assert verify(model, THREAT, x_adv, x0, right).verified.tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(("norm", "eps"), [("linf", "2/255"), ("linf", 0.015), ("l2", 0.05)])
def test_rounding_of_float32_on_the_surface_is_forgiven(norm: str, eps: float | str) -> None:
    threat = ThreatModel(norm, eps)  # type: ignore[arg-type]
    x0 = images(20, dtype=torch.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    x_adv = threat.project(x0 + torch.randn_like(x0).sign(), x0)
    y = 1 - decided(model, x_adv)
    assert verify(model, threat, x_adv, x0, y).verified.all()


def test_targets() -> None:
    model, x0, y, x_adv = broken()
    assert verify(model, THREAT, x_adv, x0, y, torch.full((5,), 1)).verified.all()
    assert not verify(model, THREAT, x_adv, x0, y, torch.full((5,), 2)).verified.any()


class Refusing(Defense):
    """A refusal column that wins where the first pixel is large."""

    num_classes, reject = 2, 2

    def forward(self, x: Tensor) -> Tensor:
        first, high = x[:, 0, 0, 0], x.new_full((len(x),), 10.0)
        return torch.stack([0 * first, 0 * first + 1, torch.where(first > 0.5, high, -high)], 1)


def test_a_refusal_is_no_success() -> None:
    x0 = torch.full((2, 1, 2, 2), 0.5)
    x_adv = x0.clone()
    x_adv[1] += 0.05
    seen = verify(Refusing(), THREAT, x_adv, x0, torch.tensor([0, 0]))
    assert seen.verified.tolist() == [True, False]
    assert seen.label.tolist() == [1, 2]


class Sick(nn.Module):
    """NaN in one column, or in all, of every second image."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.inner, self.columns = Linear(3), columns

    def forward(self, x: Tensor) -> Tensor:
        answer = self.inner(x).clone()
        answer[x[:, 0, 0, 0] > 0.5, self.columns] = math.nan
        return answer


@pytest.mark.parametrize("columns", [slice(1, 2), slice(0, 3)])
def test_nan_answers_are_neither_verified_nor_correct(columns: slice) -> None:
    x0 = images(6)
    x0[:, 0, 0, 0] = torch.tensor([0.2, 0.8] * 3)
    model = Sick(columns)
    y = (decided(model.inner, x0) + 1) % 3
    seen = verify(model, THREAT, x0, x0, y)
    for found in (seen.verified, seen.any, seen.mean > 0, seen.rounded):
        assert found.tolist() == [True, False] * 3
    assert fresh_labels(model, x0)[1::2].tolist() == [[-1]] * 3
    assert correct(model, x0, decided(model.inner, x0)).tolist() == [True, False] * 3


class Sometimes(Defense):
    """Wrong with a probability given by the first pixel, afresh at every question."""

    stochastic, num_classes = True, 2

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        assert draws is not None
        wrong = draws.uniform() < x[:, 0, 0, 0]
        return torch.stack([1 - 2 * wrong.float(), 2 * wrong.float() - 1], 1) * 5


def test_random_models_are_judged_by_the_majority() -> None:
    x = torch.full((6, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] = torch.tensor([0.0, 0.1, 0.4, 0.6, 0.9, 1.0])
    y = torch.zeros(6, dtype=torch.int64)
    seen = verify(Sometimes(), THREAT, x, x, y, draws=300)
    assert seen.verified.tolist() == [False, False, False, True, True, True]
    assert seen.any.tolist() == [False, True, True, True, True, True]
    torch.testing.assert_close(seen.mean, x[:, 0, 0, 0].double(), rtol=0, atol=0.12)
    assert seen.label.tolist() == [0, 0, 0, 1, 1, 1]
    assert fresh_labels(Sometimes(), x).shape == (6, 30)
    assert correct(Sometimes(), x, y, draws=200).tolist() == [True] * 3 + [False] * 3


def test_exactly_half_is_not_more_than_half() -> None:
    class Alternating(Sometimes):
        def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
            assert draws is not None
            wrong = (draws.step % 2).float()
            return torch.stack([1 - wrong, wrong], 1) * 5

    x, y = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    seen = verify(Alternating(), THREAT, x, x, y, draws=10)
    assert not seen.verified.any()
    assert (seen.mean == 0.5).all()
    assert not correct(Alternating(), x, y, draws=10).any()


def test_random_numbers_depend_on_index_and_seed_not_on_the_batch() -> None:
    x = torch.full((6, 1, 2, 2), 0.5)
    index = torch.tensor([9, 4, 100, 3, 2, 7])
    whole = fresh_labels(Sometimes(), x, 20, index)
    assert torch.equal(fresh_labels(Sometimes(), x, 20, index, chunk=4), whole)
    for i in range(6):
        assert torch.equal(fresh_labels(Sometimes(), x[i : i + 1], 20, index[i : i + 1])[0], whole[i])
    assert not torch.equal(fresh_labels(Sometimes(), x, 20, index, seed=1), whole)
    assert not torch.equal(fresh_labels(Sometimes(), x, 20, index, key=-4), whole)


def test_verification_draws_other_numbers_than_the_attack() -> None:
    model, x = Noisy(Small(), 4), images(3)
    from lit_adv.oracle import QueryOracle

    oracle = QueryOracle(model, 3, answers=5)
    oracle.scores(x, torch.arange(3))
    verify(model, THREAT, x, x, torch.zeros(3, dtype=torch.int64), draws=5)
    correct(model, x, torch.zeros(3, dtype=torch.int64), draws=5)
    seen = torch.cat(model.seen)
    assert len(seen.unique()) == len(seen) == 3 * 5 * 4


def test_rounding_to_8_bits_can_undo_a_win() -> None:
    class Fine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            off_grid = ((x * 255 - (x * 255).round()).abs() > 0.1).flatten(1).any(1).float()
            return torch.stack([-off_grid, off_grid - 0.5], 1)

    x0 = torch.full((2, 1, 2, 2), 128 / 255)
    seen = verify(Fine(), THREAT, x0 + 0.4 / 255, x0, torch.tensor([0, 0]))
    assert seen.verified.all()
    assert not seen.rounded.any()


@pytest.mark.parametrize("eps", ["1/255", "2/255", "8/255"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_on_the_grid_survive_rounding(eps: str, norm: str) -> None:
    """8-bit images moved by whole levels are their own rounding."""

    class Moved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            moved = ((x * 255).round() % 16 != 0).flatten(1).all(1).float()
            return torch.stack([0.5 - moved, moved], 1)

    generator = torch.Generator().manual_seed(2)
    level = int(eps.split("/")[0])
    x0 = 16 * torch.randint(1, 15, (30, 3, 8, 8), generator=generator)
    move = level * torch.randn(x0.shape, generator=generator).sign().long()
    clean, x_adv, y = x0.float() / 255, (x0 + move).float() / 255, torch.zeros(30, dtype=torch.int64)
    threat = ThreatModel(norm, eps if norm == "linf" else level / 255 * 192**0.5)  # type: ignore[arg-type]
    assert correct(Moved(), clean, y).all()
    seen = verify(Moved(), threat, x_adv, clean, y)
    assert seen.verified.all()
    assert seen.rounded.all()


def test_mode_and_gradients_are_left_alone() -> None:
    model, x0, y, x_adv = broken()
    model.train()
    with torch.enable_grad():
        seen = verify(model, THREAT, x_adv.requires_grad_(), x0, y)
    assert model.training
    assert not seen.mean.requires_grad
    assert model.weight.grad is None


def test_inference_mode() -> None:
    model, x0, y, x_adv = broken()
    with torch.inference_mode():
        seen = verify(model, THREAT, x_adv.clone(), x0.clone(), y.clone())
        assert correct(model, x0.clone(), y.clone()).all()
    assert seen.verified.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval().to(dtype)
    x = images(3, dtype=torch.float32)
    y = model(x.to(dtype)).argmax(1)
    assert correct(model, x, y).all()
    assert verify(model, THREAT, x, x, 1 - y).verified.all()


def test_models_of_labels_and_probabilities() -> None:
    model, x0, y, x_adv = broken()

    class Other(nn.Module):
        def __init__(self, labels: bool) -> None:
            super().__init__()
            self.labels = labels

        def forward(self, x: Tensor) -> Tensor:
            return model(x).argmax(1) if self.labels else model(x).softmax(1)

    assert verify(Other(True), THREAT, x_adv, x0, y, output="labels").verified.all()
    assert verify(Other(False), THREAT, x_adv, x0, y, output="probs").verified.all()


def test_no_images() -> None:
    none = images(0)
    seen = verify(Small(), THREAT, none, none, torch.zeros(0, dtype=torch.int64))
    assert len(seen.verified) == len(seen.label) == len(seen.rounded) == 0


def test_no_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        fresh_labels(Small(), images(1), 0)
