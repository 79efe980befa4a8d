"""Mean squared error against the formula."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lit_adv.datamodules import Batch
from lit_adv.objectives import MeanSquaredError


class Pair(NamedTuple):
    image: Tensor
    target: Tensor
    label: Tensor


@pytest.fixture
def model() -> nn.Module:
    return nn.Conv2d(1, 2, 3, padding=1)


@pytest.fixture
def pair() -> Pair:
    return Pair(torch.rand(5, 1, 4, 4), torch.randn(5, 2, 4, 4), torch.arange(5))


def test_loss_is_the_mean_over_all_elements(model: nn.Module, pair: Pair) -> None:
    loss, logs = MeanSquaredError()(model, pair)
    answer = model(pair.image).detach()
    total = sum(
        (float(a) - float(t)) ** 2
        for a, t in zip(answer.flatten().tolist(), pair.target.flatten().tolist(), strict=True)
    )
    assert loss.item() == pytest.approx(total / (5 * 2 * 4 * 4), rel=1e-5)
    squares = [sum(v**2 for v in image.flatten().tolist()) / 32 for image in pair.target]
    assert logs["mse_of_zero"].tolist() == pytest.approx(squares, rel=1e-5)


def test_gradient_is_that_of_the_formula(pair: Pair) -> None:
    model = nn.Conv2d(1, 2, 1).double()
    pair = Pair(pair.image.double(), pair.target.double(), pair.label)
    loss, _ = MeanSquaredError()(model, pair)
    torch.autograd.backward(loss)
    bias = model.bias
    assert bias is not None
    assert bias.grad is not None
    error = model(pair.image).detach() - pair.target
    torch.testing.assert_close(bias.grad, 2 * error.sum((0, 2, 3)) / error.numel())


def test_a_subclass_says_what_is_to_be_answered(model: nn.Module) -> None:
    class Doubled(MeanSquaredError):
        def target(self, batch: Batch) -> Tensor:  # type: ignore[override]
            return torch.cat([2 * batch.image, batch.image], 1)

    batch = Batch(torch.rand(3, 1, 4, 4), torch.arange(3), torch.arange(3))
    loss, _ = Doubled()(model, batch)
    wanted = torch.cat([2 * batch.image, batch.image], 1)
    torch.testing.assert_close(loss, ((model(batch.image) - wanted) ** 2).mean())


def test_targets_carry_no_gradient(model: nn.Module, pair: Pair) -> None:
    target = pair.target.requires_grad_()
    loss, _ = MeanSquaredError()(model, pair._replace(target=2 * target))
    torch.autograd.backward(loss)
    assert target.grad is None


def test_half_precision_answers_are_compared_in_float32(model: nn.Module, pair: Pair) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss, logs = MeanSquaredError()(model, pair)
    assert loss.dtype == logs["mse_of_zero"].dtype == torch.float32


def test_shapes_that_would_be_broadcast_are_refused(model: nn.Module, pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"answers shape \(5, 2, 4, 4\) and shall answer \(5, 1, 4, 4\)"):
        MeanSquaredError()(model, pair._replace(target=pair.target[:, :1]))


def test_batches_without_targets_are_refused(model: nn.Module) -> None:
    batch = Batch(torch.rand(3, 1, 4, 4), torch.arange(3), torch.arange(3))
    with pytest.raises(ValueError, match="must hold a tensor 'target' to regress on, Batch does not: choose data"):
        MeanSquaredError()(model, batch)
