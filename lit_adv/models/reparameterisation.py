"""Networks from images to images that stand in for a transformation, and what they are put before."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from lit_adv.models.layers import check_positive


class AutoEncoder(nn.Module):
    """Three strided convolutions down, three transposed ones up, a sigmoid last: 47,355 parameters for RGB.

    As released by the authors of the adversarial transformation. Its answer lies in (0, 1), which a transformation that
    leaves the box does not.

    Args:
        in_channels: of the images.
        widths: channels after each convolution.

    Shape:
        (n, in_channels, H, W) to the same, H and W divisible by 8.

    Raises:
        ValueError: if a size is not positive; when called, if height or width is not divisible by 8.

    References:
        Xiao and Zheng, "One Man's Trash is Another Man's Treasure", CVPR 2020, the released code.
    """

    def __init__(self, in_channels: int = 3, widths: tuple[int, int, int] = (12, 24, 48)) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, widths=widths)
        down, up = [in_channels, *widths], [*widths[::-1], in_channels]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(down):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
        for inputs, outputs in pairwise(up):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(f"AutoEncoder needs height and width divisible by 8, got {tuple(x.shape)}: take a UNet")
        return self.layers(x)


class Reparameterisation(nn.Module):
    """h(x) = x + (delta + margin) tanh(net(x)): what stays within a ball a little larger than the transformation's.

    Args:
        net: images to numbers of the same shape, its last layer unbounded, e.g. a ``UNet``.
        delta: radius of the transformation that is imitated, pixel units.
        margin: beyond it, so that the ball's faces are reached where tanh is not yet flat.

    Shape:
        (n, C, H, W) to the same, in [x - delta - margin, x + delta + margin].

    Raises:
        ValueError: if ``delta`` or ``margin`` is negative or both are 0; when called, if ``net`` answers another shape.
    """

    def __init__(self, net: nn.Module, delta: float = 0.2, margin: float = 0.05) -> None:
        super().__init__()
        if not (0 <= delta < float("inf") and 0 <= margin < float("inf") and delta + margin > 0):
            raise ValueError(f"delta and margin must be >= 0 in pixel units and not both 0, got {delta} and {margin}")
        self.net, self.delta, self.margin = net, delta, margin

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.net(x)
        if moved.shape != x.shape:
            raise ValueError(
                f"net must answer the images' shape {tuple(x.shape)}, got {tuple(moved.shape)}: choose its channels so"
            )
        return x + (self.delta + self.margin) * torch.tanh(moved)


class Composed(nn.Module):
    """One network after the other: f_a(h(x)), say.

    Args:
        first: images to images.
        second: images to logits, or what holds such a network.
        part: name of that network inside ``second``, e.g. ``"classifier"``; None: ``second`` itself.

    Raises:
        ValueError: if ``second`` has no such part.
    """

    def __init__(self, first: nn.Module, second: nn.Module, part: str | None = None) -> None:
        super().__init__()
        inner = second if part is None else getattr(second, part, None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"part must name a network inside {type(second).__name__}, which has no {part!r}")
        self.first, self.second, self.part = first, inner, part
        if (classes := getattr(inner, "num_classes", None) or getattr(second, "num_classes", None)) is not None:
            self.num_classes = int(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))
