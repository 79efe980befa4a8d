"""Residual networks with basic blocks for small images."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.models.layers import check_positive
from lit_adv.models.normalize import ImageInput


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, plus a shortcut; ReLU between and after.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution and the shortcut.

    Shape:
        (n, inputs, H, W) to (n, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 for 32x32 images by default: 11,173,962 parameters; any side, as the pooling is global.

    Args:
        num_classes: length of the logits.
        in_channels: of the images.
        blocks: basic blocks in each stage; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.
        widths: channels of each stage, as many as ``blocks``; the first has stride 1, each further one 2.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, H, W) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive or ``blocks`` and ``widths`` differ in length.

    References:
        He et al., "Deep Residual Learning", 2016, https://arxiv.org/abs/1512.03385, section 3.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        blocks: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, blocks=blocks, widths=widths)
        if len(blocks) != len(widths):
            raise ValueError(f"blocks and widths must be equally long, got {list(blocks)} and {list(widths)}")
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, mean=mean, std=std)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages = []
        channels = widths[0]
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            head = BasicBlock(channels, width, stride=1 if i == 0 else 2)
            stages.append(nn.Sequential(head, *(BasicBlock(width, width) for _ in range(count - 1))))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(self.image_input(x))))
        return self.classifier(self.stages(h).mean((2, 3)))
