"""Rectified answers image by image against the equations, with the same numbers drawn; averages; gradients past it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.nets import images
from defenses.complementary import ODD, keyed, smooth
from torch import Tensor, nn

from lit_adv.defenses import GuidedComplementary
from lit_adv.draws import Draws


def patch(model: GuidedComplementary, image: Tensor, draws: Draws) -> Tensor:
    """One image (C, H, W) by equations (12) and (13), pixel by pixel; the slope of the deciding margin by autograd."""
    assert model.image_detector is not None
    assert model.sensitivity_detector is not None
    leaf = image[None].clone().requires_grad_()
    by_image, by_map = model.image_detector.margin(leaf), model.sensitivity_detector.margin(leaf)
    surer = by_image if float(by_image.detach().abs()) > float(by_map.detach().abs()) else by_map
    (slope,) = torch.autograd.grad(surer.sum(), leaf)
    size = slope[0].abs()
    chance, normal = draws.uniform(*image.shape)[0], draws.normal(*image.shape, dtype=image.dtype)[0]
    found = image.clone()
    for channel in range(image.shape[0]):
        low, high = float(size[channel].min()), float(size[channel].max())
        mean = float(image[channel].mean())
        std = float((image[channel] - mean).square().mean().sqrt())
        for row in range(image.shape[1]):
            for column in range(image.shape[2]):
                place = channel, row, column
                suspect = float(size[place]) > model.alpha * (high - low) + low
                if suspect and float(chance[place]) < model.share:
                    value = min(max(mean + std * float(normal[place]), 0.0), 1.0)
                    found[place] = round(value * 255) / 255
    return found


def one(draws: Draws, row: int) -> Draws:
    """The draws of one row, made anew."""
    return Draws(draws.seed, draws.index[row : row + 1], draws.step[row : row + 1], draws.key)


class Watching(nn.Module):
    """Keeps what it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        logits: Tensor = self.network(x)
        return logits


def halves(**settings: Any) -> tuple[GuidedComplementary, Tensor, Tensor]:
    """A rectifying defence, images, and which of them it flags: half of them."""
    model, x = smooth(answer="rectify", alpha=0.3, **settings), images(8, 1, ODD)
    margin = model.margin(x)
    model = model.variant(threshold=float(margin.median()))
    return model, x, margin > model.threshold


def test_benign_images_are_answered_by_the_classifier_and_others_by_the_rectifier() -> None:
    model, x, flagged = halves()
    assert model.rectifier is not None
    assert flagged.sum() == 4
    found = model(x, draws=keyed(8))
    classified = model.classifier(x)
    for row in range(8):
        if not flagged[row]:
            assert torch.equal(found[row], classified[row])
            continue
        patched = patch(model, x[row], one(keyed(8), row))
        assert not torch.equal(patched, x[row])
        torch.testing.assert_close(found[row], model.rectifier(patched[None])[0], rtol=1e-9, atol=1e-12)


def test_patches_are_those_of_the_equations() -> None:
    model, x, _ = halves()
    found = model.patched(x, keyed(8))
    mask = model.suspects(x)
    for row in range(8):
        torch.testing.assert_close(found[row], patch(model, x[row], one(keyed(8), row)), rtol=0, atol=1e-12)
    assert torch.equal(found[~mask], x[~mask])
    changed = found != x
    levels = found[changed] * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
    assert torch.equal(model.variant(share=0.0).patched(x, keyed(8)), x)
    assert torch.equal(model.variant(alpha=1.0).patched(x, keyed(8)), x)
    every = model.variant(share=1.0).patched(x, keyed(8)) != x
    assert (every.sum() / mask.sum()).item() > 0.95  # but for draws that meet the value


def test_an_answer_does_not_depend_on_the_batch() -> None:
    model, x, _ = halves(averages=3)
    whole = model(x, draws=keyed(8))
    for row in range(8):
        torch.testing.assert_close(model(x[row : row + 1], draws=one(keyed(8), row))[0], whole[row], rtol=1e-9, atol=0)
    order = torch.tensor([5, 0, 7, 2])
    torch.testing.assert_close(model(x[order], draws=keyed(8)[order]), whole[order], rtol=1e-9, atol=0)
    assert model(x[:0], draws=keyed(0)).shape == (0, 4)
    assert model(x[:0]).shape == (0, 4)


def test_other_numbers_give_other_answers_and_the_same_ones_the_same() -> None:
    model, x, flagged = halves()
    first, again, other = model(x, draws=keyed(8)), model(x, draws=keyed(8)), model(x, draws=keyed(8, seed=6))
    assert torch.equal(first, again)
    assert torch.equal(first[~flagged], other[~flagged])
    assert (first != other).any(1)[flagged].all()
    torch.manual_seed(1)
    fresh = model(x)
    assert not torch.equal(fresh, model(x))
    torch.manual_seed(1)
    assert torch.equal(fresh, model(x))
    without = model.variant(share=0.0)
    assert model.rectifier is not None
    torch.testing.assert_close(without(x)[flagged], model.rectifier(x)[flagged])


def test_several_draws_are_averaged_as_probabilities() -> None:
    model, x, flagged = halves(averages=4)
    assert model.rectifier is not None
    watching = Watching(model.rectifier)
    found = model.variant(rectifier=watching)(x, draws=keyed(8))
    rows = flagged.nonzero().squeeze(1)
    assert len(watching.given) == 4
    for place, row in enumerate(rows.tolist()):
        draws, shares = one(keyed(8), row), torch.zeros(4, dtype=torch.float64)
        for number in range(4):
            patched = patch(model, x[row], draws)  # the same draws go on
            torch.testing.assert_close(watching.given[number][place], patched, rtol=0, atol=1e-12)
            shares += model.rectifier(patched[None])[0].softmax(0) / 4
        torch.testing.assert_close(found[row].exp(), shares, rtol=1e-9, atol=1e-12)
        assert len({tuple(given[place].flatten().tolist()) for given in watching.given}) == 4


def test_answers_that_are_averaged_share_no_patch() -> None:
    """Each answer of a random model is a fresh one, with several draws of its own."""
    model, x, flagged = halves(averages=3)
    assert model.rectifier is not None
    watching = Watching(model.rectifier)
    model.variant(rectifier=watching).averaged(x, 4, draws=keyed(8))
    assert len(watching.given) == 12
    for place in range(int(flagged.sum())):
        assert len({tuple(given[place].flatten().tolist()) for given in watching.given}) == 12


def test_the_gradient_passes_as_if_nothing_had_been_suppressed() -> None:
    """Of a flagged image that of the rectifier at the patched image, of another that of the classifier."""
    model, x, flagged = halves()
    assert model.rectifier is not None
    weights = torch.tensor([0.3, -1.0, 0.7, 0.2], dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad((model.surrogate(leaf, draws=keyed(8)) @ weights).sum(), leaf)
    for row in range(8):
        at = patch(model, x[row], one(keyed(8), row)) if flagged[row] else x[row]
        at = at[None].clone().requires_grad_()
        network = model.rectifier if flagged[row] else model.classifier
        (expected,) = torch.autograd.grad((network(at) @ weights).sum(), at)
        torch.testing.assert_close(slope[row], expected[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reading", ["image", "map"])
@pytest.mark.parametrize("mode", ["threshold", "quantile", "rate"])
def test_every_kind_of_mask_is_taken_of_the_sensitivity(reading: Any, mode: Any) -> None:
    model, x, _ = halves(reading=reading, mode=mode)
    size, mask = model.sensitivity(x), model.suspects(x)
    assert mask.any()
    for row in range(8):
        for channel in range(3):
            values, chosen = size[row, channel].flatten().tolist(), mask[row, channel].flatten().tolist()
            low, high = min(values), max(values)
            limit = {"threshold": 0.3, "rate": 0.7}.get(mode, 0) * (high - low) + low
            if mode == "quantile":
                limit = sorted(values, reverse=True)[round(0.3 * len(values))]
            assert chosen == [value > limit for value in values]
    joint = model.variant(joint=True).suspects(x)
    assert (joint == joint[:, :1]).all()
