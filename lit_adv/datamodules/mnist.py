"""MNIST, and Fashion-MNIST, which has its form."""

from __future__ import annotations

from lit_adv.datamodules.base import ImageDataModule
from lit_adv.datamodules.sources import PixelImages, Source, torchvision_dataset


class MNIST(ImageDataModule):
    """Handwritten digits, 60,000 training and 10,000 test images, grey, 28x28; ``<data_dir>/MNIST/raw``.

    References:
        Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning Applied to Document
        Recognition, 1998, https://doi.org/10.1109/5.726791.
    """

    name = "mnist"
    num_classes = 10
    dims = (1, 28, 28)
    kind = "MNIST"  # torchvision's class, and the folder

    def prepare_data(self) -> None:
        """Download what is absent."""
        torchvision_dataset(self.kind, self.data_dir, train=True, download=True)

    def source(self, train: bool) -> Source:
        """The images of one part, in the files' order."""
        dataset = torchvision_dataset(self.kind, self.data_dir, train)
        return PixelImages(dataset.data.unsqueeze(1), dataset.targets.long())


class FashionMNIST(MNIST):
    """Clothing, 60,000 training and 10,000 test images, grey, 28x28; ``<data_dir>/FashionMNIST/raw``.

    References:
        H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747.
    """

    name = "fashion_mnist"
    kind = "FashionMNIST"
    flip = True
