"""VGG networks: configuration A with one linear layer, and the small one of adversarial transformation."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from lit_adv.models.layers import check_positive
from lit_adv.models.normalize import ImageInput

CONFIGURATION_A = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG(nn.Module):
    """VGG-11 by default: stages of 3x3 convolution, batch norm and ReLU, each ended by a 2x2 max pool.

    Global average pooling and one linear layer follow. Images too small for the pools are padded with zeros
    (28x28 to 32x32 by default) inside the network, so that attacks and gradients keep the image's size.

    Args:
        num_classes: length of the logits; 2 for a detector.
        in_channels: of the images.
        stages: channels of each convolution, stage by stage; ((16,), (32,)) is a small network for tests.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, H, W) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive.

    References:
        Simonyan and Zisserman, 2015, https://arxiv.org/abs/1409.1556, table 1, column A.
        Li, Wang and Wu, "Are L2 adversarial examples intrinsically different?", 2020.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        stages: Sequence[Sequence[int]] = CONFIGURATION_A,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, stages=stages)
        self.num_classes = num_classes
        # one 2x2 pool per stage must leave a pixel
        self.image_input = ImageInput(in_channels, mean=mean, std=std, least_size=2 ** len(stages))
        built = []
        channels = in_channels
        for widths in stages:
            built.append(_stage(channels, widths))
            channels = widths[-1]
        self.stages = nn.Sequential(*built)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stages(self.image_input(x))
        return self.classifier(h.mean((2, 3)))


def _stage(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class SmallVGG(nn.Module):
    """The small VGG ("vgg0_bn") on which adversarial transformation makes its targeted examples.

    939,402 parameters by default. State-dict keys are ``features.<i>`` and ``classifier.<i>``, those of the
    published weights, which take images in [0, 1] without normalisation.

    Args:
        num_classes: length of the logits.
        in_channels: of the images.
        image_size: height and width in pixels, at least 16.
        width: channels of the first convolution; the others are one or two times as many, the hidden layers eight.
        dropout: probability before each of the first two linear layers.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, image_size, image_size) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive or ``image_size`` is below 16.

    References:
        Xiao and Zheng, "One Man's Trash is Another Man's Treasure", CVPR 2020.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        width: int = 64,
        dropout: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
        if image_size < 16:
            raise ValueError(f"image_size must be at least 16 for four 2x2 pools, got {image_size}")
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, image_size, mean, std)
        self.features = nn.Sequential(
            *_small_stage(in_channels, width),
            *_small_stage(width, 2 * width),
            *_small_stage(2 * width, width, width),
            *_small_stage(width, 2 * width, 2 * width),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * width * (image_size // 16) ** 2, 8 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8 * width, 8 * width),
            nn.ReLU(),
            nn.Linear(8 * width, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.image_input(x)).flatten(1))


def _small_stage(inputs: int, *widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in widths:
        conv = nn.Conv2d(inputs, width, 3, padding=1)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * width)))
        nn.init.constant_(conv.get_parameter("bias"), 0.0)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return [*layers, nn.MaxPool2d(2)]
