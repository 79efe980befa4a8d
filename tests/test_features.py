"""Which layers are looked at, and that their outputs are those of the network run by hand."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import images
from torch import Tensor, nn

from lit_adv.features import check_layers, features, features_of_many, inner_layers
from lit_adv.models import VGG, DigitsNet, ModelA, SmallVGG
from lit_adv.models.frozen import folded


class InPlace(nn.Module):
    """A hidden layer whose output is overwritten by what follows, and a layer that is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.relu, self.last = nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)
        self.idle = nn.MaxPool2d(2)
        self.asked = 0
        self.last.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.asked += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.hidden(x.flatten(1))))


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (VGG(in_channels=1), tuple(f"stages.{stage}" for stage in range(5))),
        (VGG(stages=((4,), (6,))), ("stages.0", "stages.1")),
        (DigitsNet(), ("features", "classifier.0")),
    ],
)
def test_default_layers(network: nn.Module, names: tuple[str, ...]) -> None:
    assert inner_layers(network) == names
    check_layers(network, names)


@pytest.mark.parametrize("network", [ModelA(), SmallVGG(image_size=16)])
def test_defaults_of_other_networks_exist_and_leave_out_the_logits(network: nn.Module) -> None:
    names = inner_layers(network)
    check_layers(network, names)
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    assert linear[-1] not in names
    assert set(linear[:-1]) <= set(names)


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="neither poolings nor hidden linear"):
        inner_layers(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


@pytest.mark.parametrize("names", [(), ("features", "features"), ("feature",), ("",)])
def test_wrong_names_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"layers must name layers of DigitsNet.*classifier\.0"):
        check_layers(DigitsNet(), names)


def test_features_are_means_of_maps_in_the_order_of_the_names() -> None:
    network = DigitsNet(filters=(3, 5)).double().eval()
    x = images(4, shape=(1, 8, 8))
    maps = network.features(x).detach()
    hidden = network.classifier[0](maps.flatten(1))
    found = [one.detach() for one in features(network, ("classifier.0", "features"), x)]
    torch.testing.assert_close(found[0], hidden.detach())
    for n in range(4):
        for c in range(5):
            assert float(found[1][n, c]) == pytest.approx(float(maps[n, c].sum() / 16))
    many = features_of_many(network, ("features",), x, chunk=3)
    torch.testing.assert_close(many[0], found[1])
    assert not many[0].requires_grad


def test_what_follows_in_place_changes_nothing_and_is_not_asked() -> None:
    network = InPlace()
    x = images(3, shape=(1, 2, 2), dtype=torch.float32) - 0.5
    (found,) = features(network, ("hidden",), x)
    torch.testing.assert_close(found, x.flatten(1) @ network.hidden.weight.T + network.hidden.bias)
    assert bool((found < 0).any())
    assert network.asked == 0
    assert network(x).shape == (3, 2)  # no hook is left
    assert network.asked == 1


def test_a_layer_that_takes_no_part_is_named() -> None:
    with pytest.raises(ValueError, match="does not pass images through idle"):
        features(InPlace(), ("idle", "hidden"), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_given_images_of_its_own(dtype: torch.dtype) -> None:
    network = DigitsNet(filters=(2, 2)).eval()
    x = images(3, shape=(1, 8, 8), dtype=torch.float32)
    (whole,) = features(network, ("features",), x)
    (half,) = features(network.to(dtype), ("features",), x)
    torch.testing.assert_close(half.float(), whole, rtol=0.05, atol=0.02)


def test_gradients_reach_the_image() -> None:
    network = DigitsNet(filters=(2, 2)).double().eval()
    x = images(2, shape=(1, 8, 8)).requires_grad_()
    found = features(network, ("classifier.0",), x)[0]
    direct = network.classifier[0](network.features(x).flatten(1))
    for one in range(3):
        (a,) = torch.autograd.grad(found[:, one].sum(), x, retain_graph=True)
        (b,) = torch.autograd.grad(direct[:, one].sum(), x, retain_graph=True)
        torch.testing.assert_close(a, b)


def test_a_folded_copy_has_the_same_features() -> None:
    network = VGG(in_channels=1, stages=((4, 4), (6,))).double()
    x = images(8, shape=(1, 8, 8))
    network(x)  # moves the running statistics
    network.eval()
    names = inner_layers(network)
    for a, b in zip(features(network, names, x), features(folded(network), names, x), strict=True):
        torch.testing.assert_close(a, b)
