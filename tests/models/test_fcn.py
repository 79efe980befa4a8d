"""The segmentation networks with a last layer of their own."""

import pytest
import torch
from torch import nn

from lit_adv.models import FCN


@pytest.fixture(scope="module", params=["vgg16", "resnet50"])
def network(request: pytest.FixtureRequest) -> FCN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FCN(2, 32, request.param, hidden=24, dropout=0.0)


@pytest.mark.parametrize("size", [(64, 64), (96, 70)])
def test_answers_have_a_fixed_size_whatever_the_image(network: FCN, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert network.eval()(torch.rand(1, 3, *size)).shape == (1, 2, 32, 32)


def test_an_untrained_one_is_no_constant_and_all_weights_get_gradient(network: FCN) -> None:
    network.train()
    network.zero_grad()
    answer = network(torch.rand(2, 3, 64, 64))
    assert answer.flatten(1).std(1).min() > 0
    assert (answer[0] - answer[1]).abs().max() > 0
    answer.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad.abs() > 0).any(), name


def test_layers_of_the_paper() -> None:
    """conv1 to conv5 of VGG16, fc6 of 7x7 and fc7 of 1x1, both of 4096 channels."""
    with torch.device("meta"):
        network = FCN()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [
        64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 4096, 4096, 3,
    ]  # fmt: skip
    assert [m.kernel_size[0] for m in convolutions[-3:]] == [7, 1, 1]
    assert sum(isinstance(m, nn.MaxPool2d) for m in network.modules()) == 5


def test_bad_arguments_and_images_are_refused(network: FCN) -> None:
    with pytest.raises(ValueError, match="backbone must be 'vgg16' or 'resnet50', got 'vgg19'"):
        FCN(backbone="vgg19")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out_size must hold positive whole numbers only, got 0"):
        FCN(out_size=0)
    with pytest.raises(ValueError, match=r"at least 32 pixels, got \(1, 3, 28, 28\): choose lit_adv.models.UNet"):
        network(torch.rand(1, 3, 28, 28))
    with pytest.raises(ValueError, match=r"images must have shape \(n, 3, H, W\), got \(1, 1, 64, 64\)"):
        network(torch.rand(1, 1, 64, 64))
