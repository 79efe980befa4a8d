"""The detector's loss against a plain loop over images, and that views are made once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lit_adv.detectors import ImageDetector, SensitivityDetector
from lit_adv.models import DigitsNet
from lit_adv.objectives import PairDetection
from lit_adv.objectives.detection import pair_loss, paired_views, told_apart
from lit_adv.response import Response

SMALL: dict[str, Any] = {"filters": (2, 2), "hidden": 4}


class Pairs(NamedTuple):
    image: Tensor
    x_adv: Tensor
    place: Tensor
    label: Tensor


class Counting(ImageDetector):
    """Counts the images it makes views of."""

    seen = 0

    def view(self, response: Response) -> Tensor:
        self.seen += len(response.x)
        return response.x


def pairs(count: int = 6, first: int = 0) -> Pairs:
    return Pairs(
        torch.rand(count, 1, 8, 8), torch.rand(count, 1, 8, 8), torch.arange(count) + first, torch.arange(count)
    )


def counting() -> Counting:
    return Counting(DigitsNet(**SMALL), DigitsNet(num_classes=2, **SMALL))


def test_the_loss_is_the_cross_entropy_of_as_many_clean_as_adversarial_images() -> None:
    model, batch = counting(), pairs()
    loss, logs = PairDetection()(model, batch)
    total, right = 0.0, []
    for row in range(6):
        shares = [model.network(x[row : row + 1]).softmax(1)[0].tolist() for x in (batch.image, batch.x_adv)]
        total -= math.log(shares[0][0]) + math.log(shares[1][1])
        right.append(((shares[0][0] >= shares[0][1]) + (shares[1][1] > shares[1][0])) / 2)
    assert loss.item() == pytest.approx(total / 12, rel=1e-5)
    assert logs["accuracy"].tolist() == right
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None for weight in model.network.parameters())
    assert model.classifier is not None
    assert all(weight.grad is None for weight in model.classifier.parameters())


def test_a_tie_is_benign() -> None:
    scores = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    assert told_apart(scores).tolist() == [0.5, 1, 0]
    expected = [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))]
    assert pair_loss(scores).tolist() == pytest.approx(expected)


def test_views_are_made_once_unless_forgotten() -> None:
    model, batch = counting(), pairs()
    objective = PairDetection()
    first, _ = objective(model, batch)
    assert model.seen == 12
    shuffled = Pairs(*(column[[3, 0, 5, 1, 4, 2]] for column in batch))
    again, _ = objective(model, shuffled)
    assert model.seen == 12
    assert again.item() == pytest.approx(first.item(), rel=1e-6)
    objective(model, pairs(4, first=4))  # two places are new
    assert model.seen == 16
    objective.forget()
    objective(model, batch)
    assert model.seen == 28
    always = PairDetection(keep=False)
    always(model, batch)
    loss, _ = always(model, batch)
    assert model.seen == 52
    assert loss.item() == pytest.approx(first.item(), rel=1e-6)


def test_views_are_maps_of_clean_and_adversarial_images_without_a_graph() -> None:
    model = SensitivityDetector(DigitsNet(**SMALL), DigitsNet(num_classes=2, **SMALL), "none")
    batch = pairs()
    views = paired_views(model, batch, None)
    assert views.shape == (6, 2, 1, 8, 8)
    assert not views.requires_grad
    assert model.classifier is not None
    for member, x in enumerate((batch.image, batch.x_adv)):
        torch.testing.assert_close(views[:, member], Response(model.classifier, x).gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_detector_in_half_precision_is_trained_in_it(dtype: torch.dtype) -> None:
    model, batch = counting(), pairs()
    expected, _ = PairDetection()(model, batch)
    found, _ = PairDetection()(model.to(dtype), batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be a detector with a network, .*got DigitsNet"):
        PairDetection()(DigitsNet(), pairs())
