"""The saliency channel against a plain loop over images."""

from __future__ import annotations

import pytest
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


class Deep(nn.Module):
    """A convolution, a rectifier and a linear layer over means."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 4, 3, dtype=torch.float64)
            self.last = nn.Linear(4, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().mean((2, 3)))


def test_the_saliency_of_a_layer_is_grad_cam() -> None:
    """A map's weight is the mean of d logit / d map; for a mean over rectified values it has a closed form."""
    model, x = Deep(), images(3, 4, (3, 6, 8))
    detector = SaliencyDetector(model, Channels(), layer="first")
    view = detector.view(detector.respond(x))
    with torch.no_grad():
        maps = model.first(x)
        chosen = model.last.weight[model(x).argmax(1)]  # (n, 4)
        weight = chosen * (maps > 0).double().mean((2, 3)) / maps[0, 0].numel()
        cam = (weight[:, :, None, None] * maps).sum(1, keepdim=True).clamp_min(0)
        cam = nn.functional.interpolate(cam, (6, 8), mode="bilinear", align_corners=False)
        low, high = cam.amin((1, 2, 3), keepdim=True), cam.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(view[:, 3:], (cam - low) / (high - low).clamp_min(1e-30), rtol=1e-10, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(detector.margin(leaf).sum(), leaf)
    step = 1e-6 * images(3, 5, (3, 6, 8))
    with torch.no_grad():
        rise = detector.margin(x + step) - detector.margin(x - step)
    torch.testing.assert_close((2 * slope * step).flatten(1).sum(1), rise, rtol=1e-4, atol=1e-12)


def test_layers_that_give_no_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="layer must be one of the classifier's first, last, got 'second'"):
        SaliencyDetector(Deep(), Channels(), layer="second")
    detector = SaliencyDetector(Deep(), Channels(), layer="last")
    with pytest.raises(ValueError, match="layer 'last' must give maps"):
        detector.margin(images(2, 1, (3, 6, 8)))
