"""Digits net, models A to D and Std.-CNN: counts of the paper, initial weights, response normalisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.models import DigitsNet, ModelA, ModelB, ModelC, ModelD, StdCNN


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Counted where they happen, by a hook on every layer with weights."""
    counts = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            counts.append(output.numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1])
        elif isinstance(layer, nn.Linear):
            counts.append(output.numel() * layer.in_features)

    for layer in model.modules():
        layer.register_forward_hook(count)
    model.eval()(x)
    return sum(counts)


@pytest.mark.parametrize(
    ("network", "count", "millions"),
    [(ModelA, 3_382_346, 45), (ModelB, 710_218, 8.6), (ModelC, 4_795_082, 48), (ModelD, 509_410, 0.5)],
)
def test_mnist_models_have_the_papers_size(network: type[nn.Module], count: int, millions: float) -> None:
    with torch.device("meta"):
        model = network()
        done = multiply_adds(model, torch.rand(1, 1, 28, 28))
    assert parameters(model) == count
    assert done / 1e6 == pytest.approx(millions, rel=0.02)


def test_std_cnn_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = StdCNN()
        done = multiply_adds(model, torch.rand(1, 3, 32, 32))
    assert parameters(model) == 1_756_426
    assert done / 1e6 == pytest.approx(33, rel=0.02)


def test_narrow_model_a_is_counted_by_hand() -> None:
    with torch.device("meta"):
        model = ModelA(filters=(16, 32), hidden=100)
    convolutions = (25 * 16 + 16) + (25 * 16 * 32 + 32)
    assert parameters(model) == convolutions + (20 * 20 * 32 * 100 + 100) + (100 * 10 + 10)


def test_digits_net_is_counted_by_hand() -> None:
    model = DigitsNet()
    assert multiply_adds(model, torch.rand(1, 1, 8, 8)) == 8 * 8 * 32 * 9 * (1 + 64) + 1024 * 64 + 64 * 10
    assert parameters(model) == 32 * 10 + 64 * (32 * 9 + 1) + 1025 * 64 + 65 * 10


@pytest.mark.parametrize(("network", "least"), [(DigitsNet, 2), (ModelA, 9), (ModelB, 27), (ModelC, 5), (ModelD, 1)])
def test_the_least_image_size_works_and_a_smaller_one_is_refused(network: type[nn.Module], least: int) -> None:
    model = network(image_size=least, in_channels=2, num_classes=3).eval()
    assert model(torch.rand(2, 2, least, least)).shape == (2, 3)
    with pytest.raises(ValueError, match=f"image_size must be at least {least} "):
        network(image_size=least - 1)


@pytest.mark.parametrize("image_size", [28, 29, 31])
def test_model_b_and_std_cnn_take_other_sizes(image_size: int) -> None:
    x = torch.rand(2, 1, image_size, image_size)
    assert ModelB(image_size=image_size)(x).shape == (2, 10)
    assert StdCNN(in_channels=1, image_size=image_size)(x).shape == (2, 10)


def test_dropout_acts_in_training_mode_only() -> None:
    x = torch.rand(2, 1, 28, 28)
    for network in (ModelA, ModelB, ModelC, ModelD):
        model = network()
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("network", "probabilities"),
    [
        (DigitsNet, []),
        (ModelA, [0.25, 0.5]),
        (ModelB, [0.2, 0.5]),
        (ModelC, [0.25, 0.5]),
        (ModelD, [0.5] * 4),
    ],
)
def test_dropout_has_the_published_places(network: type[nn.Module], probabilities: list[float]) -> None:
    with torch.device("meta"):
        assert [m.p for m in network().modules() if isinstance(m, nn.Dropout)] == probabilities


def test_model_b_pads_mnist_by_three_on_each_side() -> None:
    model = ModelB().double().eval()
    layers = [m for m in model.features if isinstance(m, nn.Conv2d)]
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    h = F.relu(F.conv2d(x, layers[0].weight, layers[0].bias, stride=2, padding=3))
    h = F.relu(F.conv2d(h, layers[1].weight, layers[1].bias, stride=2))
    h = F.relu(F.conv2d(h, layers[2].weight, layers[2].bias))
    torch.testing.assert_close(model(x), model.classifier(h.flatten(1)))


def test_model_d_starts_he_normal() -> None:
    torch.manual_seed(0)
    weight = next(layer for layer in ModelD().modules() if isinstance(layer, nn.Linear)).weight
    assert weight.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.02)


def test_std_cnn_starts_as_published() -> None:
    torch.manual_seed(0)
    layers = [m for m in StdCNN().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [layer.bias.unique().tolist() for layer in layers] == [
        pytest.approx([bias]) for bias in (0.0, 0.1, 0.1, 0.1, 0.0)
    ]
    for layer, std in zip(layers, (0.05, 0.05, 0.04, 0.04, 1 / 192), strict=True):
        assert layer.weight.abs().max() <= 2 * std
        # a normal cut off at two deviations has 0.880 of the deviation
        assert layer.weight.std().item() == pytest.approx(0.880 * std, rel=0.05)


def test_response_norm_divides_by_the_sum_of_nine_neighbours() -> None:
    layer = next(m for m in StdCNN().modules() if isinstance(m, nn.LocalResponseNorm))
    x = 30 * torch.rand(2, 12, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.empty_like(x)
    for c in range(12):
        near = x[:, max(c - 4, 0) : c + 5]
        expected[:, c] = x[:, c] / (1 + 0.001 / 9 * near.square().sum(1)) ** 0.75
    torch.testing.assert_close(layer(x), expected)


def test_std_cnn_pools_as_same_padding_with_minus_infinity() -> None:
    torch.manual_seed(0)
    features = list(StdCNN(filters=(8, 8)).double().features)
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    active = nn.Sequential(*features[:2])(x)
    # windows of rows 2i, 2i + 1, 2i + 2; the last lacks its third row
    rows = torch.stack([active[:, :, 2 * i : 2 * i + 3].amax(2) for i in range(16)], 2)
    expected = torch.stack([rows[..., 2 * j : 2 * j + 3].amax(-1) for j in range(16)], -1)
    assert torch.equal(nn.Sequential(*features[:4])(x), expected)
