"""Small convolutional networks for digits, MNIST and CIFAR-10."""

from collections.abc import Sequence

from torch import Tensor, nn

from lit_adv.models.layers import SamePad2d, check_positive
from lit_adv.models.normalize import ImageInput


class DigitsNet(nn.Module):
    """Two 3x3 convolutions, one 2x2 max pool and two linear layers for 8x8 digits: 1.3 million multiply-adds.

    Args:
        num_classes: length of the logits.
        in_channels: of the images.
        image_size: height and width in pixels, at least 2.
        filters: channels of the two convolutions.
        hidden: width of the hidden linear layer.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, image_size, image_size) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive or ``image_size`` is too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
        filters: tuple[int, int] = (32, 64),
        hidden: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, filters=filters, hidden=hidden)
        _check_size(image_size, 2)
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, image_size, mean, std)
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, filters[0], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(filters[0], filters[1], 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(filters[1] * (image_size // 2) ** 2, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.image_input(x)).flatten(1))


class ModelA(nn.Module):
    """Model A for MNIST: two 5x5 convolutions and two linear layers; 3,382,346 parameters by default.

    ``filters=(16, 32), hidden=100`` is the narrow variant for adversarial training on a small machine.

    Args:
        num_classes: length of the logits.
        in_channels: of the images.
        image_size: height and width in pixels, at least 9.
        filters: channels of the two convolutions.
        hidden: width of the hidden linear layer.
        dropout: probabilities after the convolutions and after the hidden layer.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, image_size, image_size) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive or ``image_size`` is too small.

    References:
        Tramer et al., 2018, https://arxiv.org/abs/1705.07204;
        Bhagoji et al., 2018, https://arxiv.org/abs/1712.09491 (models A to D).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        filters: tuple[int, int] = (64, 64),
        hidden: int = 128,
        dropout: tuple[float, float] = (0.25, 0.5),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, filters=filters, hidden=hidden)
        _check_size(image_size, 9)
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, image_size, mean, std)
        self.features = _two_convolutions(in_channels, filters, kernel=5, dropout=dropout[0])
        self.classifier = _hidden_layer(filters[1] * (image_size - 8) ** 2, hidden, dropout[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.image_input(x)).flatten(1))


class ModelB(nn.Module):
    """Model B for MNIST: dropout on the image, three convolutions of 8x8, 6x6 and 5x5; 710,218 parameters.

    Args:
        num_classes: length of the logits.
        in_channels: of the images.
        image_size: height and width in pixels, at least 27.
        filters: channels of the three convolutions.
        dropout: probabilities on the (normalised) image and before the linear layer.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, image_size, image_size) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive or ``image_size`` is too small.

    References:
        As for ``ModelA``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        filters: tuple[int, int, int] = (64, 128, 128),
        dropout: tuple[float, float] = (0.2, 0.5),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, filters=filters)
        _check_size(image_size, 27)
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, image_size, mean, std)
        self.features = nn.Sequential(
            nn.Dropout(dropout[0]),
            SamePad2d(8, 2),
            nn.Conv2d(in_channels, filters[0], 8, stride=2),
            nn.ReLU(),
            nn.Conv2d(filters[0], filters[1], 6, stride=2),
            nn.ReLU(),
            nn.Conv2d(filters[1], filters[2], 5),
            nn.ReLU(),
            nn.Dropout(dropout[1]),
        )
        side = ((image_size + 1) // 2 - 6) // 2 + 1 - 4
        self.classifier = nn.Linear(filters[2] * side**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.image_input(x)).flatten(1))


class ModelC(nn.Module):
    """Model C for MNIST: two 3x3 convolutions and two linear layers; 4,795,082 parameters by default.

    Args:
        num_classes: length of the logits.
        in_channels: of the images.
        image_size: height and width in pixels, at least 5.
        filters: channels of the two convolutions.
        hidden: width of the hidden linear layer.
        dropout: probabilities after the convolutions and after the hidden layer.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, image_size, image_size) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive or ``image_size`` is too small.

    References:
        As for ``ModelA``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        filters: tuple[int, int] = (128, 64),
        hidden: int = 128,
        dropout: tuple[float, float] = (0.25, 0.5),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, filters=filters, hidden=hidden)
        _check_size(image_size, 5)
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, image_size, mean, std)
        self.features = _two_convolutions(in_channels, filters, kernel=3, dropout=dropout[0])
        self.classifier = _hidden_layer(filters[1] * (image_size - 4) ** 2, hidden, dropout[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.image_input(x)).flatten(1))


class ModelD(nn.Module):
    """Model D for MNIST: four hidden linear layers with dropout, He-normal weights; 509,410 parameters.

    Args:
        num_classes: length of the logits.
        in_channels: of the images.
        image_size: height and width in pixels.
        widths: of the hidden layers.
        dropout: probability after each hidden layer.
        mean: per channel in [0, 1]; None for no normalisation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, image_size, image_size) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive.

    References:
        As for ``ModelA``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        widths: Sequence[int] = (300, 300, 300, 300),
        dropout: float = 0.5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, widths=widths)
        _check_size(image_size, 1)
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, image_size, mean, std)
        layers: list[nn.Module] = []
        inputs = in_channels * image_size**2
        for width in widths:
            layers += [_he_normal(nn.Linear(inputs, width)), nn.ReLU(), nn.Dropout(dropout)]
            inputs = width
        self.classifier = nn.Sequential(*layers, _he_normal(nn.Linear(inputs, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.image_input(x).flatten(1))


class StdCNN(nn.Module):
    """Std.-CNN for CIFAR-10: two 5x5 convolutions with local response normalisation; 1,756,426 parameters.

    Padding is TensorFlow's "same" throughout. Its training adds to the loss 0.004 times half the squared
    norm of the weights of the two hidden linear layers.

    Args:
        num_classes: length of the logits.
        in_channels: of the images.
        image_size: height and width in pixels.
        filters: channels of the two convolutions.
        hidden: widths of the two hidden linear layers.
        mean: per channel in [0, 1]; None standardises each image by its own mean and deviation.
        std: per channel in [0, 1].

    Shape:
        (n, in_channels, image_size, image_size) in [0, 1] to logits (n, num_classes).

    Raises:
        ValueError: if a size is not positive.

    References:
        Bhagoji et al., 2018, https://arxiv.org/abs/1712.09491.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        filters: tuple[int, int] = (64, 64),
        hidden: tuple[int, int] = (384, 192),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels, filters=filters, hidden=hidden)
        _check_size(image_size, 1)
        self.num_classes = num_classes
        self.image_input = ImageInput(in_channels, image_size, mean, std, standardize=True)
        conv1, conv2 = nn.Conv2d(in_channels, filters[0], 5, padding=2), nn.Conv2d(*filters, 5, padding=2)
        fc1 = nn.Linear(filters[1] * (-(-image_size // 4)) ** 2, hidden[0])
        fc2, fc3 = nn.Linear(*hidden), nn.Linear(hidden[1], num_classes)
        for layer, std_, bias in (
            (conv1, 0.05, 0.0),
            (conv2, 0.05, 0.1),
            (fc1, 0.04, 0.1),
            (fc2, 0.04, 0.1),
            (fc3, 1 / hidden[1], 0.0),
        ):
            nn.init.trunc_normal_(layer.get_parameter("weight"), std=std_, a=-2 * std_, b=2 * std_)
            nn.init.constant_(layer.get_parameter("bias"), bias)
        # everything pooled is at least 0, so zero padding is as good as TensorFlow's minus infinity
        self.features = nn.Sequential(
            conv1, nn.ReLU(), SamePad2d(3, 2), nn.MaxPool2d(3, 2), _response_norm(),
            conv2, nn.ReLU(), _response_norm(), SamePad2d(3, 2), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.classifier = nn.Sequential(fc1, nn.ReLU(), fc2, nn.ReLU(), fc3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(self.image_input(x)).flatten(1))


def _check_size(image_size: int, least: int) -> None:
    if image_size < least:
        raise ValueError(f"image_size must be at least {least} pixels for this network, got {image_size}")


def _two_convolutions(inputs: int, filters: tuple[int, int], kernel: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, filters[0], kernel),
        nn.ReLU(),
        nn.Conv2d(filters[0], filters[1], kernel),
        nn.ReLU(),
        nn.Dropout(dropout),
    )


def _hidden_layer(inputs: int, hidden: int, dropout: float, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes))


def _he_normal(layer: nn.Linear) -> nn.Linear:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def _response_norm() -> nn.Module:
    # TensorFlow's radius 4 and alpha 0.001 / 9 per element: PyTorch divides alpha by the window itself
    return nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
