"""The detector of images looks at nothing but the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_adv.detectors import ImageDetector
from lit_adv.models import DigitsNet


class Untouchable(nn.Module):
    """A classifier that must not be asked."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("asked")


def test_its_margin_is_that_of_the_network_on_the_image() -> None:
    torch.manual_seed(0)
    network = DigitsNet(num_classes=2, filters=(2, 2), hidden=4)
    detector = ImageDetector(Untouchable(), network).eval()
    x = torch.rand(5, 1, 8, 8)
    logits = network(x)
    torch.testing.assert_close(detector.margin(x), logits[:, 1] - logits[:, 0])
    assert torch.equal(detector(x), logits)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(detector.margin(leaf).sum(), leaf)
    again = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((network(again) @ torch.tensor([-1.0, 1.0])).sum(), again)
    torch.testing.assert_close(slope, expected)


def test_calibration_and_fitting_teach_it_nothing() -> None:
    detector = ImageDetector(DigitsNet(filters=(2, 2), hidden=4), DigitsNet(2, filters=(2, 2), hidden=4))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.calibrate(iter([torch.rand(2, 1, 8, 8)]))
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
