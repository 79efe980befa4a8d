"""Pre-activation residual networks for CIFAR-10 as TensorFlow's examples built them: thin and wide."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.models.layers import SamePad2d, check_positive
from lit_adv.models.normalize import ImageInput

SLOPE = 0.1


def _norm(channels: int) -> nn.BatchNorm2d:
    # a running average that keeps 0.9 of the old value: PyTorch's momentum is the share of the new one
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1 if stride == 1 else 0, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * outputs)))
    return conv if stride == 1 else nn.Sequential(SamePad2d(3, stride), conv)


class PreactivationUnit(nn.Module):
    """Batch norm, leaky ReLU and 3x3 convolution, twice, plus a shortcut without weights.

    Where the shape changes, the shortcut is average pooling and zero channels on both sides.

    Args:
        inputs: channels that come in.
        outputs: channels that go out, at least as many.
        stride: of the first convolution.
        activate_shortcut: the shortcut starts after the first activation (only in a network's first unit).

    Shape:
        (n, inputs, H, W) to (n, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, activate_shortcut: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.extra = outputs - inputs
        self.activate_shortcut = activate_shortcut
        self.norm1 = _norm(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm2 = _norm(outputs)
        self.conv2 = _conv3x3(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm1(x), SLOPE)
        shortcut = self._shortcut(h if self.activate_shortcut else x)
        h = F.leaky_relu(self.norm2(self.conv1(h)), SLOPE)
        return shortcut + self.conv2(h)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        if self.extra:
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return x


class WideResNet(nn.Module):
    """A residual network of pre-activation units with leaky ReLU 0.1, for 32x32 images.

    | network | units | widths | parameters |
    |---|---|---|---|
    | Resnet-32 | 5 | 16, 32, 64 | 464,154 |
    | Resnet-28-10 | 4 | 160, 320, 640 | 36,220,634 |
    | WRN of the adversarial training challenge (default) | 5 | 160, 320, 640 | 45,901,914 |

    Args:
        num_classes: length of the logits.
        in_channels: of the images; 48 for thermometer codes of 16 levels.
        units: residual units in each stage.
        widths: channels of each stage; the first has stride 1, each further one 2.
        stem: channels of the first convolution.
        mean: per channel in [0, 1]; None standardises each image by its own mean and deviation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, H, W) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive or a stage is narrower than the one before.

    References:
        Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146;
        He et al., "Identity Mappings", 2016, https://arxiv.org/abs/1603.05027;
        Madry et al., 2018, https://arxiv.org/abs/1706.06083;
        Bhagoji et al., 2018, https://arxiv.org/abs/1712.09491 (Resnet-32 and Resnet-28-10).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        units: int = 5,
        widths: Sequence[int] = (160, 320, 640),
        stem: int = 16,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, units=units, widths=widths, stem=stem)
        channels = [stem, *widths]
        if channels != sorted(channels):
            raise ValueError(f"widths must not shrink, nor start below stem={stem}, got {list(widths)}")
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, mean=mean, std=std, standardize=True)
        self.stem = _conv3x3(in_channels, stem)
        self.stages = nn.Sequential(
            *(_stage(channels[i], channels[i + 1], units, first=i == 0) for i in range(len(widths)))
        )
        self.norm = _norm(channels[-1])
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(self.stem(self.image_input(x)))
        h = F.leaky_relu(self.norm(h), SLOPE)
        return self.classifier(h.mean((2, 3)))


def _stage(inputs: int, outputs: int, units: int, first: bool) -> nn.Sequential:
    head = PreactivationUnit(inputs, outputs, stride=1 if first else 2, activate_shortcut=first)
    return nn.Sequential(head, *(PreactivationUnit(outputs, outputs) for _ in range(units - 1)))
