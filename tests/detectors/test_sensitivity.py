"""The scales of gradient maps by hand, the detector's slope by differences, and the ranking without training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contracts.nets import Linear, Small, images
from torch import Tensor, nn

from lit_adv.detectors import InputSensitivity, SensitivityDetector
from lit_adv.detectors.sensitivity import SCALINGS
from lit_adv.models import DigitsNet
from lit_adv.response import Response

SHAPE = (3, 5, 7)


def network(seed: int = 5) -> nn.Module:
    """Two smooth logits of a map."""
    return Small(2, SHAPE, seed)


def maps(model: nn.Module, x: Tensor) -> Tensor:
    """Gradients of the cross-entropy at the predicted class, image by image."""
    found = []
    for image in torch.split(x, 1):
        leaf = image.clone().requires_grad_()
        logits = model(leaf)
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, logits.argmax(1)), leaf)
        found.append(slope)
    return torch.cat(found)


def test_one_number_scales_all_maps() -> None:
    model, x = Small(4, SHAPE), images(7, 1, SHAPE)
    found = maps(model, x)
    entries = found.flatten().tolist()
    mean_square = sum(value**2 for value in entries) / len(entries)
    ordered = sorted(abs(value) for value in entries)
    tau = ordered[math.ceil(0.9 * len(ordered)) - 1]
    for batches in ([x], [x[:3], x[3:4], x[4:]]):
        for scaling, scale, view in (
            ("rms", math.sqrt(mean_square), found / math.sqrt(mean_square)),
            ("signed_log", tau, found.sign() * (1 + found.abs() / tau).log()),
        ):
            detector = SensitivityDetector(model, network(), scaling)  # type: ignore[arg-type]
            detector.calibrate(iter(batches))
            assert float(detector.scale) == pytest.approx(scale, rel=1e-10)
            torch.testing.assert_close(detector.view(detector.respond(x)), view, rtol=1e-9, atol=1e-12)


def test_maps_as_they_are_or_each_over_its_own_size() -> None:
    model, x = Small(4, SHAPE), images(5, 2, SHAPE)
    found = maps(model, x)
    raw, own = (SensitivityDetector(model, network(), scaling) for scaling in ("none", "image"))
    torch.testing.assert_close(raw.view(raw.respond(x)), found, rtol=1e-9, atol=1e-12)
    size = (found**2).mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(own.view(own.respond(x)), found / size, rtol=1e-9, atol=1e-12)
    model.second.data *= 3  # surer, so of another sensitivity
    assert float((own.view(own.respond(x)) ** 2).mean()) == pytest.approx(1)


def test_the_margin_is_the_networks_of_the_scaled_map() -> None:
    model, x = Small(4, SHAPE), images(4, 3, SHAPE)
    detector = SensitivityDetector(model, network())
    detector.calibrate([x])
    logits = network()(maps(model, x) / detector.scale)
    torch.testing.assert_close(detector.margin(x), logits[:, 1] - logits[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_its_slope_passes_through_the_map(scaling: Any) -> None:
    """Against differences in float64; where the scaling is even (signed_log), too."""
    model, x = Small(4, SHAPE), images(2, 4, SHAPE)
    detector = SensitivityDetector(model, network(), scaling)
    detector.calibrate([x])
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(detector.margin(leaf).sum(), leaf)
    assert slope.isfinite().all()
    assert slope.flatten(1).any(1).all()
    h = 1e-6
    for place in range(0, 105, 9):
        step = torch.zeros(105, dtype=x.dtype)
        step[place] = h
        step = step.view(SHAPE)
        expected = (detector.margin(x + step) - detector.margin(x - step)) / (2 * h)
        torch.testing.assert_close(slope.flatten(1)[:, place], expected, rtol=1e-4, atol=1e-7)


def test_maps_that_vanish_everywhere_have_scale_one() -> None:
    model = Linear(3, SHAPE)
    model.weight.data.zero_()
    x = images(3, 5, SHAPE)
    for scaling in SCALINGS:
        detector = SensitivityDetector(model, network(), scaling)  # type: ignore[arg-type]
        detector.calibrate([x])
        assert (detector.view(detector.respond(x)) == 0).all()
        if scaling in ("rms", "signed_log"):
            assert float(detector.scale) == 1


def test_it_asks_to_be_calibrated_and_keeps_the_scale_in_its_state() -> None:
    model, x = DigitsNet(filters=(2, 2), hidden=4), torch.rand(3, 1, 8, 8)
    two = DigitsNet(num_classes=2, filters=(2, 2), hidden=4)
    detector = SensitivityDetector(model, two)
    with pytest.raises(ValueError, match=r"scaling 'rms' has not been calibrated: call calibrate"):
        detector.margin(x)
    detector.calibrate([x])
    other = SensitivityDetector(DigitsNet(filters=(2, 2), hidden=4), DigitsNet(2, filters=(2, 2), hidden=4))
    other.load_state_dict(detector.state_dict())
    assert torch.equal(other.margin(x), detector.margin(x))
    assert torch.equal(other.scale, detector.scale)


def test_what_cannot_be_calibrated_on_is_refused() -> None:
    model = Small(4, SHAPE)
    with pytest.raises(ValueError, match="scaling must be one of rms, signed_log, none, image, got 'log'"):
        SensitivityDetector(model, network(), "log")  # type: ignore[arg-type]
    detector = SensitivityDetector(model, network())
    with pytest.raises(ValueError, match="no training images to calibrate"):
        detector.calibrate([])
    x = images(3, 6, SHAPE)

    class Rooted(Small):
        """Has no finite slope where an image is all black."""

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x)
            return logits + x.square().sum((1, 2, 3))[:, None].sqrt() * torch.arange(4, device=x.device)

    broken = SensitivityDetector(Rooted(4, SHAPE), network())
    with pytest.raises(ValueError, match="hold NaN or inf for 1 of 3 training images"):
        broken.calibrate([torch.cat([x[:1], torch.zeros_like(x[:1]), x[2:]])])
    x[1] = torch.nan
    with pytest.raises(ValueError, match="images hold NaN or inf: leave them out"):
        detector.calibrate([x])


def test_maps_too_small_for_squares_in_single_precision_keep_their_shape() -> None:
    model, x = Linear(4, SHAPE).float(), images(2, 3, SHAPE).float()

    class Given(Response):
        """A response whose map is tiny."""

        @property
        def gradient(self) -> Tensor:
            return super().gradient * 1e-24

    detector = SensitivityDetector(model, network(), "image")
    view, tiny = detector.view(Response(model, x)), detector.view(Given(model, x))
    torch.testing.assert_close(tiny, view, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiny.square().mean((1, 2, 3)), torch.ones(2), rtol=1e-4, atol=1e-4)


def test_ranking_by_sensitivity_alone_has_a_floor() -> None:
    model, x = Small(4, SHAPE), images(4, 7, SHAPE)
    detector = InputSensitivity(model)
    size = maps(model, x).flatten(1).norm(dim=1)
    torch.testing.assert_close(detector.score(x), size.log10(), rtol=1e-9, atol=1e-9)
    model.second.data.zero_()
    assert detector.score(x).tolist() == [-30.0] * 4


def test_nearest_adversarial_images_stand_out_without_training() -> None:
    """Just over a linear boundary S is half the gap's slope; of clean images further off it is smaller."""
    model, x = Linear(2, SHAPE), images(40, 8, SHAPE)
    w = (model.weight[1] - model.weight[0]).detach()
    gap = x.flatten(1) @ w
    over = x - (1 + 1e-6) * (gap / (w @ w))[:, None, None, None] * w.view(SHAPE)
    detector = InputSensitivity(model)
    clean, adversarial = detector.score(x), detector.score(over)
    torch.testing.assert_close(adversarial, (w.norm() / 2).log10().expand(40), rtol=0, atol=1e-5)
    assert (clean < adversarial).all()
    assert Response(model, over).label.ne(Response(model, x).label).all()
