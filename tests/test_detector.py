"""What all detectors share: a frozen classifier, state of any size, scores in chunks, margins of two logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.nets import Linear, images
from torch import Tensor, nn

from lit_adv.detector import Detector, NetworkDetector, scores
from lit_adv.detectors import ImageDetector, InputSensitivity, SensitivityDetector
from lit_adv.draws import Draws
from lit_adv.models import VGG, DigitsNet
from lit_adv.response import Response

SMALL: dict[str, Any] = {"filters": (2, 2), "hidden": 4}


class Brightness(Detector):
    """The mean of an image less that of the training images, which it learns with one number an image."""

    seen: Tensor

    def __init__(self, classifier: nn.Module | None = None) -> None:
        super().__init__(classifier)
        self.register_buffer("seen", torch.zeros(0))
        self.sizes: list[int] = []

    def fit(self, training: object, clean: Tensor, x_adv: Tensor) -> None:
        self.seen = clean.mean((1, 2, 3))

    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        self.sizes.append(len(x))
        return x.mean((1, 2, 3)) - (self.seen.mean() if len(self.seen) else 0)


class Random(Brightness):
    stochastic = True

    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        assert draws is not None
        return draws.normal(2)[:, 1]


class Two(NetworkDetector):
    """A detector whose network's answers are the first two pixels."""

    def __init__(self) -> None:
        super().__init__(DigitsNet(**SMALL), nn.Sequential(nn.Flatten()))

    def view(self, response: Response) -> Tensor:
        return response.x[:, :, 0, :2]


def test_the_classifier_stays_frozen_and_in_eval_mode() -> None:
    classifier = VGG(in_channels=1, stages=((2,), (2,)))
    detector = ImageDetector(classifier, VGG(num_classes=2, in_channels=1, stages=((2,), (2,))))
    nn.ModuleList([detector]).train()
    detector.train().requires_grad_()
    assert detector.network.training
    assert not any(module.training for module in classifier.modules())
    assert not any(weight.requires_grad for weight in classifier.parameters())
    assert all(weight.requires_grad for weight in detector.network.parameters())
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    detector(torch.rand(4, 1, 8, 8)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert all(weight.grad is None for weight in classifier.parameters())
    assert all(weight.grad is not None for weight in detector.network.parameters())


def test_buffers_of_another_size_are_read() -> None:
    detector = Brightness()
    detector.fit(None, torch.rand(5, 1, 2, 2), torch.rand(5, 1, 2, 2))
    other = nn.ModuleList([Brightness(), Brightness()])
    other.load_state_dict({f"{number}.seen": detector.seen for number in range(2)})
    assert torch.equal(other[1].get_buffer("seen"), detector.seen)
    with pytest.raises(RuntimeError, match="Missing key"):
        Brightness().load_state_dict({})
    copy = Brightness().double()
    copy.load_state_dict(detector.state_dict())
    assert copy.seen.dtype == torch.float64


def test_without_a_classifier_there_is_no_response() -> None:
    with pytest.raises(ValueError, match="Brightness has no classifier to ask: give one"):
        Brightness().respond(torch.rand(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), TypeError, "divide uint8 by 255"),
        (torch.full((1, 1, 8, 8), torch.nan), ValueError, "images hold NaN or inf"),
        (torch.full((1, 1, 8, 8), 200.0), ValueError, r"images must lie in \[0, 1\]"),
        (torch.zeros(1, 8, 8), ValueError, r"images must be \(n, C, H, W\)"),
    ],
)
def test_what_is_no_image_is_refused(x: Tensor, error: type[Exception], said: str) -> None:
    detector = ImageDetector(DigitsNet(**SMALL), DigitsNet(num_classes=2, **SMALL))
    for ask in (detector, detector.margin, detector.score, InputSensitivity(DigitsNet(**SMALL)).score):
        with pytest.raises(error, match=said):
            ask(x)


def test_the_margin_is_the_difference_of_the_two_logits() -> None:
    x = torch.tensor([[0.2, 0.9], [0.7, 0.1], [0.5, 0.5]]).view(3, 1, 1, 2).expand(-1, -1, 2, -1)
    detector = Two()
    for found in (detector.margin(x), detector.score(x)):
        torch.testing.assert_close(found, torch.tensor([0.7, -0.6, 0.0]))
    assert torch.equal(detector(x), x[:, 0, 0])
    shares = detector(x.double()).softmax(1)[:, 1]
    torch.testing.assert_close(detector.margin(x.double()).sigmoid(), shares)


def test_networks_without_two_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network must have two outputs, .*got num_classes=10"):
        ImageDetector(DigitsNet(**SMALL), DigitsNet(**SMALL))
    detector = ImageDetector(DigitsNet(**SMALL), nn.Flatten())
    with pytest.raises(ValueError, match=r"network must return two logits per image, \(n, 2\), got shape \(3, 64\)"):
        detector.margin(torch.rand(3, 1, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_detector_in_half_precision_answers_in_single(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    detector = ImageDetector(DigitsNet(**SMALL), DigitsNet(num_classes=2, **SMALL)).eval()
    x = torch.rand(4, 1, 8, 8).to(dtype)
    expected = detector.margin(x)
    found = detector.to(dtype).margin(x)
    assert found.dtype == detector(x).dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_scores_do_not_depend_on_chunks() -> None:
    x = torch.rand(11, 1, 3, 3)
    detector = Brightness()
    whole = scores(detector, x)
    assert whole.dtype == torch.float64
    assert torch.equal(whole, x.mean((1, 2, 3)).double())
    detector.sizes.clear()
    assert torch.equal(scores(detector, x, chunk=4), whole)
    assert detector.sizes == [4, 4, 3]
    assert scores(detector, x[:0]).shape == (0,)


def test_random_scores_are_keyed_by_place_and_seed() -> None:
    x, detector = torch.rand(9, 1, 2, 2), Random()
    whole = scores(detector, x, chunk=2)
    assert len(set(whole.tolist())) == 9
    assert torch.equal(whole, scores(detector, x))
    chosen = torch.tensor([8, 0, 3])
    assert torch.equal(scores(detector, x[chosen], index=chosen), whole[chosen])
    assert not torch.equal(scores(detector, x, seed=1), whole)


def test_scores_that_are_nan_are_told() -> None:
    x = torch.rand(3, 1, 2, 2)
    x[1] = torch.nan
    with pytest.raises(ValueError, match="Brightness scores 1 of 3 images with NaN: its weights or"):
        scores(Brightness(), x)


def test_scores_are_those_of_eval_mode_and_leave_the_mode_alone() -> None:
    """A network in train mode would mix the rows and move its statistics."""
    detector = ImageDetector(DigitsNet(**SMALL), VGG(num_classes=2, in_channels=1, stages=((4,), (4,)))).train()
    x = torch.rand(6, 1, 8, 8)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    found = scores(detector, x)
    assert detector.network.training
    assert not detector.classifier.training  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert torch.equal(found, scores(detector.eval(), x))


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 8, 6)])
def test_a_row_alone_scores_as_in_the_batch(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(4)
    network = VGG(num_classes=2, in_channels=shape[0], stages=((4,), (4,))).double()
    network(images(16, 1, shape))
    detector = SensitivityDetector(Linear(4, shape), network, scaling="image").eval()
    x = images(5, 2, shape)
    whole = detector.margin(x)
    for row in range(5):
        torch.testing.assert_close(detector.margin(x[row : row + 1])[0], whole[row], rtol=1e-10, atol=1e-12)
    assert detector.margin(x[:0]).shape == (0,)
