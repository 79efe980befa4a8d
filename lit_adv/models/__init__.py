"""Networks from images in [0, 1] to logits, each with its normalisation as the first layer."""

from lit_adv.models.fcn import FCN
from lit_adv.models.normalize import ImageInput, Normalize, StandardizeImage
from lit_adv.models.pixelcnn import PixelCNN, PixelDensity
from lit_adv.models.reparameterisation import AutoEncoder, Composed, Reparameterisation
from lit_adv.models.resnet import ResNet
from lit_adv.models.small import DigitsNet, ModelA, ModelB, ModelC, ModelD, StdCNN
from lit_adv.models.unet import UNet
from lit_adv.models.vgg import VGG, SmallVGG
from lit_adv.models.wide_resnet import WideResNet

__all__ = [
    "FCN",
    "VGG",
    "AutoEncoder",
    "Composed",
    "DigitsNet",
    "ImageInput",
    "ModelA",
    "ModelB",
    "ModelC",
    "ModelD",
    "Normalize",
    "PixelCNN",
    "PixelDensity",
    "Reparameterisation",
    "ResNet",
    "SmallVGG",
    "StandardizeImage",
    "StdCNN",
    "UNet",
    "WideResNet",
]
