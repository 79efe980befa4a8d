"""Networks from images in [0, 1] to logits, each with its normalisation as the first layer."""

from lit_adv.models.normalize import ImageInput, Normalize, StandardizeImage
from lit_adv.models.resnet import ResNet
from lit_adv.models.small import DigitsNet, ModelA, ModelB, ModelC, ModelD, StdCNN
from lit_adv.models.vgg import VGG, SmallVGG
from lit_adv.models.wide_resnet import WideResNet

__all__ = [
    "VGG",
    "DigitsNet",
    "ImageInput",
    "ModelA",
    "ModelB",
    "ModelC",
    "ModelD",
    "Normalize",
    "ResNet",
    "SmallVGG",
    "StandardizeImage",
    "StdCNN",
    "WideResNet",
]
