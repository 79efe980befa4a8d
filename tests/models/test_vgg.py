"""VGG-11 with padding inside, and the small VGG with its published keys."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_adv.models import VGG, SmallVGG


def test_vgg11_is_configuration_a_with_one_linear_layer() -> None:
    widths = [64, 128, 256, 256, 512, 512, 512, 512]
    with torch.device("meta"):
        model = VGG(num_classes=2).eval()
        assert model(torch.rand(3, 3, 32, 32)).shape == (3, 2)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == widths
    weights = sum(9 * a * b + 2 * b for a, b in zip([3, *widths], widths, strict=False))
    assert sum(p.numel() for p in model.parameters()) == weights + 513 * 2


@pytest.mark.parametrize(("side", "last"), [(28, 1), (32, 1), (64, 2)])
def test_vgg11_pools_five_times(side: int, last: int) -> None:
    with torch.device("meta"):
        model = VGG(in_channels=1).eval()
        maps = model.stages(model.image_input(torch.rand(1, 1, side, side)))
    assert maps.shape == (1, 512, last, last)


def test_mnist_is_the_same_network_on_images_padded_by_two() -> None:
    torch.manual_seed(0)
    stages = ((4,), (4,), (4,), (4,), (4,))
    model = VGG(in_channels=1, stages=stages, mean=[0.13], std=[0.3]).double().eval()
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    assert torch.equal(logits, model(F.pad(x, (2, 2, 2, 2))))
    assert torch.autograd.grad(logits.sum(), x)[0].shape == x.shape


def test_the_small_variant_has_two_blocks() -> None:
    model = VGG(in_channels=1, stages=[[16], [32]]).eval()
    x = torch.rand(2, 1, 28, 28)
    assert model.stages(model.image_input(x)).shape == (2, 32, 7, 7)
    assert sum(p.numel() for p in model.parameters()) == 9 * 16 + 32 + 9 * 16 * 32 + 64 + 33 * 10
    with pytest.raises(ValueError, match="stages must hold"):
        VGG(stages=[[16], []])


def test_small_vgg_has_the_published_size_and_keys() -> None:
    with torch.device("meta"):
        model = SmallVGG().eval()
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert model.features(torch.rand(2, 3, 32, 32)).shape == (2, 128, 2, 2)
    assert sum(p.numel() for p in model.parameters()) == 939_402
    state = model.state_dict()
    assert sum(v.numel() for v in state.values()) == 940_560
    channels = {0: (3, 64), 4: (64, 128), 8: (128, 64), 11: (64, 64), 15: (64, 128), 18: (128, 128)}
    weights = {f"features.{i}": (b, a, 3, 3) for i, (a, b) in channels.items()}
    weights |= {"classifier.1": (512, 512), "classifier.4": (512, 512), "classifier.6": (10, 512)}
    expected = {f"{key}.{kind}" for key in weights for kind in ("weight", "bias")}
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"features.{i + 1}.{kind}" for i in channels for kind in kinds}
    assert set(state) == expected
    assert {key: tuple(state[f"{key}.weight"].shape) for key in weights} == weights


def test_small_vgg_starts_as_published() -> None:
    torch.manual_seed(0)
    last = [m for m in SmallVGG().modules() if isinstance(m, nn.Conv2d)][-1]
    assert last.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert last.bias.abs().max() == 0


def test_small_vgg_takes_mnist_and_refuses_less_than_sixteen_pixels() -> None:
    assert SmallVGG(in_channels=1, image_size=28).eval()(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"image_size must be at least 16 .* got 15"):
        SmallVGG(image_size=15)
