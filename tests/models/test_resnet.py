"""ResNet-18 for small images, and a block against its formula."""

import pytest
import torch
from torch import nn

from lit_adv.models import ResNet
from lit_adv.models.resnet import BasicBlock


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet18_has_the_published_size() -> None:
    with torch.device("meta"):
        model = ResNet().eval()
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)
        assert count(model) == 11_173_962
        assert count(ResNet(num_classes=200)) == 11_173_962 + 190 * 513


def test_resnet18_halves_the_side_three_times() -> None:
    with torch.device("meta"):
        model = ResNet().eval()
        h, shapes = model.stem(torch.rand(1, 3, 32, 32)), []
        for stage in model.stages:
            h = stage(h)
            shapes.append(tuple(h.shape[1:]))
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_a_block_with_silent_convolutions_is_its_shortcut() -> None:
    block = BasicBlock(3, 3).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(block(x), x.clamp(min=0))
    assert len(block.shortcut) == 0
    assert len(BasicBlock(3, 3, stride=2).shortcut) == len(BasicBlock(3, 4).shortcut) == 2


def test_blocks_and_widths_must_match() -> None:
    with pytest.raises(ValueError, match=r"blocks and widths .* \[2, 2\] and \[4\]"):
        ResNet(blocks=(2, 2), widths=(4,))
    with pytest.raises(ValueError, match="blocks must hold positive"):
        ResNet(blocks=(2, 0), widths=(4, 8))
