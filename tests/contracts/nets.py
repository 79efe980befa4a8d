"""Tiny classifiers for tests of attacks: a linear one, a smooth one, and wrappers that watch what they are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_adv.defense import Defense
from lit_adv.defenses import Thermometer
from lit_adv.draws import Draws

SHAPE = (3, 8, 8)


def images(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform images with values on no grid, float64 unless said otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=generator, dtype=torch.float64).to(dtype)


class Linear(nn.Module):
    """``weight @ x + bias`` on images; margins of clean images can be set by hand."""

    def __init__(self, classes: int = 3, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = torch.Size(shape).numel()
        self.weight = nn.Parameter(torch.randn(classes, size, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(classes, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


class Small(nn.Module):
    """One hidden layer of tanh: smooth, and attacks need a few steps."""

    def __init__(self, classes: int = 4, shape: tuple[int, ...] = SHAPE, seed: int = 2, scale: float = 2.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = torch.Size(shape).numel()
        first = torch.randn(16, size, generator=generator, dtype=torch.float64) / size**0.5
        second = torch.randn(classes, 16, generator=generator, dtype=torch.float64)
        self.first, self.second, self.scale = nn.Parameter(first), nn.Parameter(second), scale

    def forward(self, x: Tensor) -> Tensor:
        return ((x.flatten(1) - 0.5) * self.scale @ self.first.T).tanh() @ self.second.T


class Means(nn.Module):
    """From images to means of a search, of the images' size: a fixed pattern and a little of the image."""

    def __init__(self, channels: int = 3, seed: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(channels, channels, 3, 3, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x - 0.5, self.weight, padding=1)


class Counting(nn.Module):
    """Counts, by the nearest clean image, what the wrapped model is really given."""

    def __init__(self, model: nn.Module, clean: Tensor) -> None:
        super().__init__()
        self.model, self.clean = model, clean.flatten(1).clone()
        self.seen = torch.zeros(len(clean), dtype=torch.int64)
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach().flatten(1).to(self.clean.dtype), self.clean).argmin(1)
        self.seen += nearest.bincount(minlength=len(self.clean))
        self.largest = max(self.largest, len(x))
        return self.model(x)


class Undeclared(nn.Module):
    """Random, and does not say so."""

    def __init__(self, noise: float = 0.5) -> None:
        super().__init__()
        self.net, self.noise = Small(), noise

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + self.noise * torch.randn_like(x))
        return logits


class Detached(nn.Module):
    """Answers without a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.net(x)
        return logits


class Noisy(Defense):
    """A classifier behind fresh Gaussian noise of its own, also in eval mode."""

    stochastic = True

    def __init__(self, model: nn.Module, classes: int, noise: float = 0.1) -> None:
        super().__init__()
        self.model, self.num_classes, self.noise = model, classes, noise
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        if draws is None:
            noise = torch.randn_like(x)
        else:
            noise = draws.normal(*x.shape[1:], dtype=x.dtype)
        self.seen.append(noise.flatten(1)[:, 0])
        return self.model(x + self.noise * noise)

    def surrogate(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        return self(x, draws)


def decided(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own decisions, as labels that are right."""
    with torch.no_grad():
        return model(x).argmax(1)


def near_boundary(count: int, norm: str, classes: int = 3, seed: int = 0) -> tuple[Linear, Tensor, Tensor, float]:
    """A linear classifier and images all at one known distance from its nearest other class.

    Two classes matter: logit_1 - logit_0 = w x + b, so the nearest adversarial image lies at |w x + b| over the dual
    norm of w. All images are moved along w to the same margin, far inside the box.

    Returns the model, the images, their labels (0) and their distance in ``norm``.
    """
    model = Linear(classes, seed=seed + 1)
    x = 0.4 + 0.2 * images(count, seed)
    with torch.no_grad():
        model.weight[2:] = 0
        model.bias[2:] = -1e3
        w = model.weight[1] - model.weight[0]
        gap = -4.0
        flat = x.flatten(1)
        offset = (flat @ w).mean()
        model.bias[1] = gap - offset
        flat = flat - ((flat @ w - offset) / (w @ w))[:, None] * w
    dual = w.abs().sum() if norm == "linf" else w.norm()
    return model, flat.view_as(x), torch.zeros(count, dtype=torch.int64), float(-gap / dual)


def safe(scale: float = 0.2, count: int = 3, shape: tuple[int, ...] = (3, 8, 8)) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier that no small change can fool, images and labels."""
    model = Linear(3, shape)
    x = 0.1 + 0.8 * images(count, 4, shape)
    with torch.no_grad():
        model.weight *= scale
        model.bias[0] = 1e3
    return model, x, torch.zeros(count, dtype=torch.int64)


class Recording(nn.Module):
    """Keeps every image it is given; there must be some."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert len(x)
        self.given.append(x.clone())
        return self.inner(x)


class Decoder(nn.Module):
    """Gives a classifier of images what a code is about; steps are unequal, lest slopes of levels cancel to noise."""

    def __init__(self, model: nn.Module, levels: int) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, code: Tensor) -> Tensor:
        step = (1 + 0.5 * torch.arange(self.levels, dtype=code.dtype).sin()) / self.levels
        levels = code.view(len(code), code.shape[1] // self.levels, self.levels, *code.shape[2:])
        logits: Tensor = self.model((levels * step[:, None, None]).sum(2))
        return logits


class Coded(Thermometer):
    """Any classifier of images behind thermometer codes, for attacks on those alone."""

    def __init__(self, model: nn.Module, levels: int = 64, classes: int = 4) -> None:
        super().__init__(Decoder(model, levels), levels, channels=SHAPE[0], num_classes=classes)
        self.inner = model

    @property
    def seen(self) -> Tensor:
        """What the classifier has counted."""
        assert isinstance(self.inner, Counting)
        return self.inner.seen


def behind(attack: object, model: nn.Module) -> nn.Module:
    """The model, or for an attack on one kind of defence alone, that defence around the model."""
    return Coded(model) if getattr(attack, "attacks", None) is Thermometer else model


def counting(model: nn.Module, clean: Tensor) -> Counting | Coded:
    """The same model, which counts what it is given."""
    return Coded(Counting(model.inner, clean)) if isinstance(model, Coded) else Counting(model, clean)
