"""Data sets, one a file, all of images in [0, 1]."""

from lit_adv.datamodules.attacked import AttackedBatch, AttackedDataset, AttackedImages
from lit_adv.datamodules.base import Batch, ImageDataModule
from lit_adv.datamodules.cifar10 import CIFAR10, CIFAR10Jpeg
from lit_adv.datamodules.dataset import ImageDataset
from lit_adv.datamodules.digits import Digits
from lit_adv.datamodules.imagenet import ImageNet
from lit_adv.datamodules.mnist import MNIST, FashionMNIST
from lit_adv.datamodules.pairs import PairBatch, PerturbationPairs
from lit_adv.datamodules.tiny_imagenet import TinyImageNet

__all__ = [
    "CIFAR10",
    "MNIST",
    "AttackedBatch",
    "AttackedDataset",
    "AttackedImages",
    "Batch",
    "CIFAR10Jpeg",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageDataset",
    "ImageNet",
    "PairBatch",
    "PerturbationPairs",
    "TinyImageNet",
]
