"""PixelDefend against a plain loop, its radius, and what an attacker sees of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_adv.defenses import PixelDefend
from lit_adv.models import DigitsNet, PixelCNN, PixelDensity

LEVELS = 12


class Weighted(nn.Module):
    """A random linear classifier."""

    num_classes = 3

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, size))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.to(x.dtype).T


def density(channels: int = 1, levels: int = LEVELS) -> PixelCNN:
    torch.manual_seed(0)
    model = PixelCNN(channels, 4 * channels, 2, kernel=3, first_kernel=3, levels=levels).double()
    for name, weight in model.named_parameters():  # what comes before shall count for more than the biases
        nn.init.normal_(weight, std=0.2 if name.endswith("bias") else 1.5)
    return model


def defended(channels: int = 1, eps_d: int = 3, once: bool = False, side: int = 4) -> PixelDefend:
    return PixelDefend(Weighted(channels * side**2).double(), density(channels), eps_d, once).eval()


def pictures(n: int, channels: int = 1, side: int = 4, levels: int = LEVELS) -> Tensor:
    return torch.randint(levels, (n, channels, side, side)).double() / (levels - 1)


@torch.no_grad()
def by_hand(model: PixelDensity, image: Tensor, eps_d: int, once: bool) -> Tensor:
    """One image (C, H, W), value by value, every conditional from a whole pass."""
    level = [[[round(float(v) * (LEVELS - 1)) for v in row] for row in plane] for plane in image]
    given = [[list(row) for row in plane] for plane in level]
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            for c in range(image.shape[0]):
                basis = torch.tensor([given if once else level], dtype=torch.float64) / (LEVELS - 1)
                logs = model.log_conditionals(basis)[0, c, i, j].tolist()
                old = level[c][i][j]
                allowed = range(max(0, old - eps_d), min(LEVELS - 1, old + eps_d) + 1)
                level[c][i][j] = max(allowed, key=lambda k, logs=logs: logs[k])  # type: ignore[misc]
    return torch.tensor(level, dtype=torch.float64) / (LEVELS - 1)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("eps_d", [1, 3, 40])
def test_purification_is_that_of_a_plain_loop(eps_d: int, channels: int, once: bool) -> None:
    model = defended(channels, eps_d, once)
    x = pictures(2, channels)
    expected = torch.stack([by_hand(model.density, image, eps_d, once) for image in x])
    torch.testing.assert_close(model.purify(x), expected, rtol=0, atol=1e-12)


def test_the_order_matters() -> None:
    x = pictures(4)
    assert not torch.equal(defended().purify(x), defended(once=True).purify(x))


@pytest.mark.parametrize("once", [False, True])
def test_nothing_moves_further_than_the_radius_and_radius_0_moves_nothing(once: bool) -> None:
    x = torch.randint(256, (3, 1, 6, 6)).float() / 255
    for eps_d in (0, 1, 16, 32):
        model = PixelDefend(Weighted(36), density(levels=256), eps_d, once)
        z = model.purify(x)
        assert (z - x).abs().max() <= eps_d / 255 + 1e-6
        assert torch.equal(z, z.mul(255).round().div(255))
        assert z.dtype == x.dtype
        assert torch.equal(z, x) == (eps_d == 0)


def test_every_choice_is_the_likeliest_given_the_result() -> None:
    """Purified in order, each value is the likeliest within its window given the purified values before it."""
    model, x = defended(3, 2), pictures(3, 3)
    z = model.purify(x)
    with torch.no_grad():
        logs = model.density.log_conditionals(z)
    old, new = ((image * (LEVELS - 1)).round().long().unsqueeze(-1) for image in (x, z))
    allowed = (torch.arange(LEVELS) - old).abs() <= 2
    assert torch.equal(logs.masked_fill(~allowed, float("-inf")).argmax(-1, keepdim=True), new)


def test_deployed_and_surrogate_agree_and_the_gradient_is_the_identitys() -> None:
    model = defended()
    x = pictures(3).requires_grad_()
    told = model.surrogate(x)
    assert torch.equal(told, model(x))
    assert torch.equal(told, model.classifier(model.purify(x)))
    (gradient,) = torch.autograd.grad(told[:, 1].sum(), x)
    torch.testing.assert_close(gradient.flatten(1), model.classifier.get_parameter("weight")[1].detach().expand(3, -1))
    assert not model.stochastic


def test_rows_do_not_see_one_another() -> None:
    model, x = defended(), pictures(5)
    assert torch.equal(model.purify(x), torch.cat([model.purify(row[None]) for row in x.flip(0)]).flip(0))
    assert model(x[:0]).shape == (0, 3)


def test_the_density_stays_frozen_and_in_eval_mode() -> None:
    model = defended().train().requires_grad_(True)
    assert model.classifier.training
    assert not model.density.training
    assert all(weight.requires_grad for weight in model.classifier.parameters())
    assert not any(weight.requires_grad for weight in model.density.parameters())
    with torch.inference_mode():
        assert model(pictures(2)).shape == (2, 3)


def test_images_outside_the_box_and_of_half_precision_are_taken() -> None:
    model = PixelDefend(DigitsNet(filters=(2, 2), hidden=4), PixelCNN(filters=2, layers=1), 16).eval()
    x = torch.rand(2, 1, 8, 8) * 1.2 - 0.1
    assert (model.purify(x) >= 0).all()
    assert (model.purify(x) <= 1).all()
    assert model.bfloat16()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps_d": -1}, "eps_d must be a whole number of levels, at least 0, as 32 of 255, got -1"),
        ({"eps_d": 0.1}, "eps_d must be a whole number"),
        ({"density": nn.Identity()}, "density must give conditionals value by value, as a PixelCNN does, got Identity"),
        ({"classifier": nn.Identity()}, "num_classes"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"classifier": Weighted(4), "density": PixelCNN(filters=2, layers=1), **arguments}
    with pytest.raises(ValueError, match=message):
        PixelDefend(**given)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or inf"):
        defended()(torch.full((1, 1, 4, 4), float("nan"), dtype=torch.float64))
