"""Networks from images to images that stand in for a transformation."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.nets import Small, images
from torch import Tensor, nn

from lit_adv.models import AutoEncoder, Composed, Reparameterisation, UNet


class Wide(nn.Module):
    """Ten times the image, less a half: far beyond where tanh is flat, in both directions."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * (x - 0.5)


def test_auto_encoder_has_the_released_layers() -> None:
    network = AutoEncoder()
    assert sum(p.numel() for p in network.parameters()) == 47_355
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        (3, 12), (12, 24), (24, 48), (48, 24), (24, 12), (12, 3),
    ]  # fmt: skip
    assert all((c.kernel_size, c.stride, c.padding) == ((4, 4), (2, 2), (1, 1)) for c in convolutions)
    answer = network(images(2, shape=(3, 32, 32), dtype=torch.float32))
    assert answer.shape == (2, 3, 32, 32)
    assert ((answer > 0) & (answer < 1)).all()
    with pytest.raises(ValueError, match=r"divisible by 8, got \(1, 1, 28, 28\)"):
        AutoEncoder(1)(torch.rand(1, 1, 28, 28))


def test_residual_form_is_the_formula_and_keeps_to_its_ball() -> None:
    x = images(3, shape=(1, 8, 8))
    answer = Reparameterisation(Wide(), 0.2, 0.05)(x)
    for value, told in zip(x.flatten().tolist(), answer.flatten().tolist(), strict=True):
        assert told == pytest.approx(value + 0.25 * math.tanh(10 * (value - 0.5)))
    assert ((answer - x).abs() <= 0.25).all()
    assert (answer < 0).any()  # where a sigmoid cannot go
    assert (answer > 1).any()


@pytest.mark.parametrize("network", [Reparameterisation(UNet(1, widths=(4, 8)), 0.3), AutoEncoder(1)],
                         ids=["residual", "auto_encoder"])  # fmt: skip
def test_untrained_networks_depend_on_the_image_and_can_be_trained(network: nn.Module) -> None:
    """The released FCN-8s is constant as written, with all weights 0; ours are not."""
    x = images(8, shape=(1, 16, 16), dtype=torch.float32)
    answer = network(x)
    assert answer.shape == x.shape
    assert (answer.std(0) > 0).all()
    answer.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_composition_is_one_after_the_other_with_the_gradient_of_the_chain() -> None:
    first, second = Reparameterisation(Wide(), 0.2), Small()
    both, x = Composed(first, second), images(2).requires_grad_()
    torch.testing.assert_close(both(x), second(first(x)))
    (gradient,) = torch.autograd.grad(both(x)[:, 1].sum(), x)
    with torch.no_grad():
        step = 1e-6 * torch.ones_like(x)
        quotient = (both(x + step)[:, 1] - both(x - step)[:, 1]) / 2e-6
    torch.testing.assert_close(gradient.flatten(1).sum(1), quotient, rtol=1e-6, atol=1e-8)


def test_composition_takes_a_part_alone() -> None:
    holder = nn.Module()
    holder.classifier = Small()
    holder.num_classes = 4  # type: ignore[assignment]
    both, x = Composed(nn.Identity(), holder, "classifier"), images(2)
    assert torch.equal(both(x), holder.classifier(x))
    assert both.num_classes == 4
    with pytest.raises(ValueError, match="part must name a network inside Module, which has no 'inner'"):
        Composed(nn.Identity(), holder, "inner")


@pytest.mark.parametrize(("delta", "margin"), [(-0.1, 0.2), (0.0, 0.0), (math.nan, 0.1), (0.2, math.inf)])
def test_bad_radii_are_refused(delta: float, margin: float) -> None:
    with pytest.raises(ValueError, match="delta and margin must be >= 0"):
        Reparameterisation(nn.Identity(), delta, margin)


def test_a_network_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"net must answer the images' shape \(1, 3, 8, 8\), got \(1, 2, 8, 8\)"):
        Reparameterisation(nn.Conv2d(3, 2, 1), 0.2)(torch.rand(1, 3, 8, 8))
