"""Cross-entropy against the formula."""

import pytest
import torch
from torch import nn

from lit_adv.datamodules import Batch
from lit_adv.objectives import Standard


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0]), torch.arange(6))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_loss_is_the_mean_of_minus_log_probability(model: nn.Module, batch: Batch) -> None:
    loss, logs = Standard()(model, batch)
    with torch.no_grad():
        p = model(batch.image).exp()
        p = p / p.sum(1, keepdim=True)
    expected = sum(-p[i, y].log() for i, y in enumerate(batch.label)) / 6
    torch.testing.assert_close(loss.detach(), expected)
    right = [int(row.argmax()) == int(y) for row, y in zip(p, batch.label, strict=True)]
    assert logs["accuracy"].tolist() == [float(r) for r in right]


def test_label_smoothing_mixes_in_the_uniform_distribution(model: nn.Module, batch: Batch) -> None:
    loss, _ = Standard(label_smoothing=0.3)(model, batch)
    with torch.no_grad():
        log_p = model(batch.image).log_softmax(1)
    q = torch.full((6, 3), 0.1).scatter(1, batch.label[:, None], 0.8)
    torch.testing.assert_close(loss.detach(), -(q * log_p).sum(1).mean())


def test_label_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 1.5"):
        Standard(label_smoothing=1.5)


def test_loss_of_half_precision_logits_is_float32(model: nn.Module, batch: Batch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = Standard()(model, batch)
    assert loss.dtype == torch.float32
