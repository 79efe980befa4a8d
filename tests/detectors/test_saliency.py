"""The saliency channel against a plain loop over images."""

from __future__ import annotations

import torch
from contracts.nets import Linear, Small, images
from torch import Tensor, nn

from lit_adv.detectors import SaliencyDetector

SHAPE = (3, 5, 7)


class Channels(nn.Module):
    """Two logits: the means of the first and of the last channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))[:, [0, -1]]


def test_the_further_channel_is_the_scaled_saliency_of_the_predicted_class() -> None:
    model, x = Small(4, SHAPE), images(4, 1, SHAPE)
    detector = SaliencyDetector(model, Channels())
    view = detector.view(detector.respond(x))
    assert view.shape == (4, 4, 5, 7)
    assert torch.equal(view[:, :3], x)
    for row in range(4):
        leaf = x[row : row + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(leaf).amax(), leaf)
        size = slope[0].abs().amax(0)
        expected = (size - size.min()) / (size.max() - size.min())
        torch.testing.assert_close(view[row, 3], expected, rtol=1e-12, atol=1e-14)
        margin = expected.mean() - x[row, 0].mean()
        torch.testing.assert_close(detector.margin(x)[row], margin, rtol=1e-12, atol=1e-14)


def test_an_even_saliency_gives_an_empty_channel() -> None:
    model = Linear(3, SHAPE)
    model.weight.data.fill_(2.0)
    detector = SaliencyDetector(model, Channels())
    x = torch.zeros(2, *SHAPE, dtype=torch.float64)
    assert (detector.view(detector.respond(x))[:, 3] == 0).all()
    model.weight.data.zero_()
    assert (detector.view(detector.respond(x))[:, 3] == 0).all()


def test_the_magnitude_is_taken_out() -> None:
    model, x = Linear(3, SHAPE), images(2, 2, SHAPE)
    detector = SaliencyDetector(model, Channels())
    before = detector.view(detector.respond(x))
    model.weight.data.mul_(1e-12)
    torch.testing.assert_close(detector.view(detector.respond(x)), before)


def test_its_margin_is_differentiable_through_the_saliency() -> None:
    detector, x = SaliencyDetector(Small(4, SHAPE), Channels()), images(2, 3, SHAPE)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(detector.margin(leaf).sum(), leaf)
    h = 1e-6
    for place in range(0, 105, 11):
        step = torch.zeros(105, dtype=x.dtype)
        step[place] = h
        step = step.view(SHAPE)
        expected = (detector.margin(x + step) - detector.margin(x - step)) / (2 * h)
        torch.testing.assert_close(slope.flatten(1)[:, place], expected, rtol=1e-5, atol=1e-8)
