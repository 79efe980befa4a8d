"""Fully convolutional networks of semantic segmentation, with a last layer that answers maps of a fixed size."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.models.layers import check_positive
from lit_adv.models.normalize import ImageInput

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LEAST = 32


class FCN(nn.Module):
    """A segmentation network whose last two layers are replaced, so that it answers (n, out_channels, 32, 32).

    ``vgg16`` is the paper's: conv1 to conv5, fc6 of 7x7 and fc7 of 1x1, then a 1x1 convolution and a stride-4
    transposed one in place of the segmentation's score and stride-32 up-sampling, whose exact surgery is unpublished;
    what remains to ``out_size`` is bilinear. ``resnet50`` is torchvision's network, its score layer replaced.

    Args:
        out_channels: of the answer.
        out_size: height and width of the answer.
        backbone: "vgg16" or "resnet50".
        pretrained: fetch torchvision's weights for the layers kept: of VGG16 those of ImageNet classification
            (convolutions alone), of ResNet-50 those of COCO with the labels of PASCAL VOC, for which the paper's were
            trained, too. A checkpoint of such a network looks for them again, in torch's cache first.
        hidden: channels of fc6 and fc7; vgg16 only.
        dropout: after each of them; vgg16 only.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, 3, H, W) in [0, 1], sides of at least 32, to (n, out_channels, out_size, out_size).

    Raises:
        ValueError: if a size is not positive or the backbone unknown; when called, if an image is too small.

    References:
        Long, Shelhamer and Darrell, 2015, https://arxiv.org/abs/1411.4038.
        Li et al. 2019, https://arxiv.org/abs/1905.00441, appendix A.4.
    """

    def __init__(
        self,
        out_channels: int = 3,
        out_size: int = 32,
        backbone: Literal["vgg16", "resnet50"] = "vgg16",
        pretrained: bool = False,
        hidden: int = 4096,
        dropout: float = 0.5,
        mean: Sequence[float] | None = IMAGENET_MEAN,
        std: Sequence[float] | None = IMAGENET_STD,
    ) -> None:
        super().__init__()
        check_positive(out_channels=out_channels, out_size=out_size, hidden=hidden)
        self.out_size = out_size
        self.image_input = ImageInput(3, mean=mean, std=std)
        if backbone == "vgg16":
            from torchvision.models import VGG16_Weights, vgg16

            features = vgg16(weights=VGG16_Weights.IMAGENET1K_FEATURES if pretrained else None).features
            self.network = nn.Sequential(
                features,
                *_convolution(512, hidden, 7, dropout),
                *_convolution(hidden, hidden, 1, dropout),
                nn.Conv2d(hidden, out_channels, 1),
                nn.ConvTranspose2d(out_channels, out_channels, 8, stride=4, padding=2),
            )
        elif backbone == "resnet50":
            from torchvision.models.segmentation import FCN_ResNet50_Weights, fcn_resnet50

            weights = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1 if pretrained else None
            whole = fcn_resnet50(weights=weights, weights_backbone=None)
            whole.classifier[4] = nn.Conv2d(512, out_channels, 1)
            self.network = nn.Sequential(_Features(whole.backbone), whole.classifier)
        else:
            raise ValueError(f"backbone must be 'vgg16' or 'resnet50', got {backbone!r}")

    def forward(self, x: Tensor) -> Tensor:
        x = self.image_input(x)
        if min(x.shape[2:]) < _LEAST:
            raise ValueError(
                f"images must have sides of at least {_LEAST} pixels, got {tuple(x.shape)}: choose "
                "lit_adv.models.UNet for small ones"
            )
        sides = (self.out_size, self.out_size)
        return F.interpolate(self.network(x), sides, mode="bilinear", align_corners=False)


class _Features(nn.Module):
    """The one map that torchvision's backbone answers under the name "out"."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)["out"]


def _convolution(inputs: int, width: int, kernel: int, dropout: float) -> list[nn.Module]:
    return [nn.Conv2d(inputs, width, kernel, padding=kernel // 2), nn.ReLU(), nn.Dropout2d(dropout)]
