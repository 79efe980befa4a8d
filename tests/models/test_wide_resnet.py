"""Pre-activation networks: published sizes, shortcuts, settings of the batch norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_adv.models import StandardizeImage, WideResNet
from lit_adv.models.wide_resnet import PreactivationUnit


def by_hand(units: int, widths: tuple[int, ...]) -> int:
    """Convolutions without bias, two batch norms a unit, one at the end, one linear layer."""
    total, inputs = 3 * 16 * 9, 16
    for width in widths:
        for _ in range(units):
            total += 9 * inputs * width + 9 * width * width + 2 * inputs + 2 * width
            inputs = width
    return total + 2 * inputs + 10 * inputs + 10


@pytest.mark.parametrize(
    ("units", "widths", "count"),
    [(5, (16, 32, 64), 464_154), (4, (160, 320, 640), 36_220_634), (5, (160, 320, 640), 45_901_914)],
)
def test_sizes_are_the_published_ones(units: int, widths: tuple[int, ...], count: int) -> None:
    with torch.device("meta"):
        model = WideResNet(units=units, widths=widths).eval()
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == count == by_hand(units, widths)


def test_batch_norm_and_weights_start_as_published() -> None:
    torch.manual_seed(0)
    model = WideResNet(units=1, widths=(32, 64))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.1)}
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is None for m in convolutions)
    last = convolutions[-1].weight
    assert last.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)


@pytest.mark.parametrize("activate", [False, True])
def test_the_shortcut_pools_and_pads_channels_on_both_sides(activate: bool) -> None:
    unit = PreactivationUnit(2, 5, stride=2, activate_shortcut=activate).double().eval()
    nn.init.zeros_(unit.conv2.weight)  # what is left is the shortcut
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    start = x
    if activate:
        scaled = x / (1 + 1e-3) ** 0.5  # the batch norm before it has seen nothing yet
        start = torch.where(scaled > 0, scaled, 0.1 * scaled)
    pooled = (start[..., ::2, ::2] + start[..., 1::2, ::2] + start[..., ::2, 1::2] + start[..., 1::2, 1::2]) / 4
    expected = torch.zeros(3, 5, 2, 3, dtype=torch.float64)
    expected[:, 1:3] = pooled  # three channels more: one before, two after
    torch.testing.assert_close(unit(x), expected)


def test_a_unit_follows_its_formula() -> None:
    unit = PreactivationUnit(3, 3).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def active(h: torch.Tensor) -> torch.Tensor:
        h = h / (1 + 1e-3) ** 0.5
        return torch.maximum(h, 0.1 * h)

    h = F.conv2d(active(x), unit.conv1.weight, padding=1)
    torch.testing.assert_close(unit(x), x + F.conv2d(active(h), unit.conv2.weight, padding=1))


def test_only_the_first_unit_of_the_net_activates_its_shortcut() -> None:
    model = WideResNet(units=2, widths=(16, 32))
    flags = [m.activate_shortcut for m in model.modules() if isinstance(m, PreactivationUnit)]
    assert flags == [True, False, False, False]


@pytest.mark.parametrize("side", [7, 24, 28])
def test_odd_sides_and_many_channels_are_taken(side: int) -> None:
    model = WideResNet(in_channels=48, units=1, widths=(4, 6, 8), stem=4).eval()
    assert model(torch.rand(2, 48, side, side)).shape == (2, 10)


def test_each_image_is_standardised_unless_mean_is_given() -> None:
    assert isinstance(WideResNet(units=1, widths=(16,)).image_input.normalize, StandardizeImage)
    model = WideResNet(units=1, widths=(4,), stem=4).double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(255 * x + 3))
    plain = WideResNet(units=1, widths=(4,), stem=4, mean=[0.0], std=[1.0]).double().eval()
    assert not torch.allclose(plain(x), plain(255 * x + 3))


def test_widths_must_not_shrink() -> None:
    with pytest.raises(ValueError, match=r"widths must not shrink.*stem=16.*\[8, 16\]"):
        WideResNet(widths=(8, 16))


def test_a_strided_convolution_starts_its_windows_on_even_pixels() -> None:
    convolution = PreactivationUnit(1, 1, stride=2).double().conv1
    weight = next(convolution.parameters())
    nn.init.zeros_(weight)
    weight.data[0, 0, 0, 0] = 1.0  # looks at the window's first pixel alone
    x = torch.rand(1, 1, 6, 8, dtype=torch.float64)
    assert torch.equal(convolution(x), x[..., ::2, ::2])
