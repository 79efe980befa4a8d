"""Finite differences along the directions of a basis: every pixel, random groups of pixels, principal components."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import scipy.linalg
import torch
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.estimator import ProbeEstimator
from lit_adv.fitted import Fitted, fit_or_read, read_fit


class Basis(ABC):
    """Directions along which differences are taken; a number names one of them."""

    @abstractmethod
    def count(self, shape: torch.Size) -> int:
        """Directions of an estimate, for images of ``shape`` (C, H, W)."""

    @abstractmethod
    def choose(self, x: Tensor, draws: Draws, numbers: Tensor) -> Tensor:
        """What the other methods must know of these directions, (n, g, ...).

        Args:
            numbers: of each row's directions, (n, g); those from :meth:`count` on do not exist.
        """

    @abstractmethod
    def shift(self, x: Tensor, told: Tensor, amount: float, out: Tensor) -> None:
        """Write ``x`` plus ``amount`` of each direction into ``out`` (n, g, C, H, W)."""

    @abstractmethod
    def along(self, told: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
        """How much of each direction lies between two images of it: (n, g), from (n, g, C, H, W) or (n, 1, C, H, W)."""

    @abstractmethod
    def combine(self, told: Tensor, slope: Tensor, x: Tensor) -> Tensor:
        """The sum of the directions times their slopes (n, g): (n, C, H, W)."""

    @property
    def needs_fit(self) -> bool:
        """Whether it must still learn from training images."""
        return False

    @property
    def fitted_on(self) -> str:
        """Hash of what it has learnt from; empty where it learns nothing."""
        return ""

    def fit(self, images: Tensor, path: str | Path | None = None) -> None:
        """Learn from training images; ``path`` keeps what was learnt."""
        return


@dataclass(frozen=True)
class Coordinates(Basis):
    """Every element of the image by itself: plain finite differences."""

    def count(self, shape: torch.Size) -> int:
        return shape.numel()

    def choose(self, x: Tensor, draws: Draws, numbers: Tensor) -> Tensor:
        return torch.where(numbers < x[0].numel(), numbers, -1).unsqueeze(2)

    def shift(self, x: Tensor, told: Tensor, amount: float, out: Tensor) -> None:
        out.copy_(x.unsqueeze(1))
        out.flatten(2).scatter_add_(2, *_places(told, amount, x.dtype))

    def along(self, told: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
        place, weight = _places(told, 1.0, plus.dtype)
        moved = _pick(plus, place) - _pick(minus, place)
        return (moved * weight).sum(2) / weight.sum(2)

    def combine(self, told: Tensor, slope: Tensor, x: Tensor) -> Tensor:
        place, weight = _places(told, 1.0, x.dtype)
        total = x.new_zeros(len(x), x[0].numel())
        return total.scatter_add_(1, place.flatten(1), (weight * slope.unsqueeze(2)).flatten(1)).view_as(x)


@dataclass(frozen=True)
class RandomGroups(Coordinates):
    """Random disjoint sets of elements that cover the image, moved together; drawn anew for every row and estimate.

    The difference along a set stands for the sum of its elements' derivatives, not their mean: for steps along the
    sign that is the same.

    Args:
        size: elements of a set, from 1; the whole image is one set where it is smaller.
        rounding: ``ceil``: the last set is smaller where the size does not divide the image; ``floor``, as released:
            it takes the remainder along.

    Raises:
        ValueError: an argument out of its range.
    References:
        Bhagoji et al. 2018, https://arxiv.org/abs/1712.09491, algorithm 1.
    """

    size: int = 8
    rounding: Literal["ceil", "floor"] = "ceil"

    def __post_init__(self) -> None:
        if self.size < 1 or self.rounding not in ("ceil", "floor"):
            raise ValueError(
                f"size must be at least 1 element and rounding ceil or floor, got {self.size} and {self.rounding!r}"
            )

    def count(self, shape: torch.Size) -> int:
        elements = shape.numel()
        return max(1, elements // self.size if self.rounding == "floor" else -(-elements // self.size))

    def choose(self, x: Tensor, draws: Draws, numbers: Tensor) -> Tensor:
        elements, groups = x[0].numel(), self.count(x.shape[1:])
        size = min(self.size, elements)
        most = max(size, elements - (groups - 1) * size)
        begin = (numbers * size).unsqueeze(2)
        end = torch.where(numbers == groups - 1, elements, (numbers + 1) * size).unsqueeze(2)
        place = begin + torch.arange(most, device=x.device)
        order = draws.later(0).permutation(elements)  # from the first call on: the same in all blocks of an estimate
        member = order.gather(1, place.clamp_max(elements - 1).flatten(1)).view_as(place)
        return torch.where((place < end) & (numbers < groups).unsqueeze(2), member, -1)


class PrincipalComponents(Basis):
    """The directions in which training images vary most, each of unit length.

    The components are those of training images, as the paper's "representative set"; the released code takes them from
    the images under attack. Elements that are the same in all of them have no part in any component: there the
    estimate is 0.

    Args:
        components: of the largest variance, from 1 to the rank of the training images.
        path: safetensors file written by :meth:`fit`; None: :meth:`fit` must be called.

    Raises:
        ValueError: an argument out of its range, or a file that cannot be read or holds too few components.
    References:
        Bhagoji et al. 2018, https://arxiv.org/abs/1712.09491, algorithm 2.
    """

    def __init__(self, components: int = 100, path: Path | None = None) -> None:
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.components, self.path = components, path
        self._fitted: Fitted | None = None
        self._matrix = torch.zeros(0)
        if path is not None:
            self._take(read_fit(path))

    @property
    def needs_fit(self) -> bool:
        return self._fitted is None

    @property
    def fitted_on(self) -> str:
        return "" if self._fitted is None else self._fitted.source

    def fit(self, images: Tensor, path: str | Path | None = None) -> None:
        """Find the components of images (N, C, H, W).

        Args:
            path: file that keeps them: read where it stems from these very images, else written.

        Raises:
            ValueError: bad images, or more components than their rank.
        """

        def learn() -> dict[str, Tensor]:
            mean, components, variance = principal_components(images, self.components)
            return {"mean": mean, "components": components, "variance": variance}

        self._take(fit_or_read(path, images, None, f"components {self.components}", learn))

    def _take(self, fitted: Fitted) -> None:
        found = fitted.tensors.get("components")
        if found is None or found.dim() != 4 or len(found) < self.components:
            held = "none" if found is None else f"a tensor {tuple(found.shape)}"
            raise ValueError(
                f"path must hold at least {self.components} components (k, C, H, W), got {held} in {self.path}: lower "
                "components, or leave path out and call attack.fit(images, labels)"
            )
        self._fitted, self._matrix = fitted, found[: self.components].flatten(1)

    def count(self, shape: torch.Size) -> int:
        if self._fitted is None:
            raise ValueError(
                "PrincipalComponents has learnt nothing yet: call attack.fit(images, labels) with training images, or "
                "name a fitted file as path"
            )
        learnt = tuple(self._fitted.tensors["components"].shape[1:])
        if learnt != tuple(shape):
            raise ValueError(
                f"the principal components are those of images {learnt}, but the images under attack are "
                f"{tuple(shape)}: fit them on images like these"
            )
        return self.components

    def choose(self, x: Tensor, draws: Draws, numbers: Tensor) -> Tensor:
        return numbers.clamp_max(self.components - 1)

    def shift(self, x: Tensor, told: Tensor, amount: float, out: Tensor) -> None:
        torch.add(x.flatten(1).unsqueeze(1), self._of(x)[told], alpha=amount, out=out.flatten(2))

    def along(self, told: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
        return ((plus - minus).flatten(2) * self._of(plus)[told]).sum(2)

    def combine(self, told: Tensor, slope: Tensor, x: Tensor) -> Tensor:
        weight = x.new_zeros(len(x), self.components).scatter_add_(1, told, slope)
        with torch.autocast(x.device.type, enabled=False):
            return (weight @ self._of(x)).view_as(x)

    def _of(self, x: Tensor) -> Tensor:
        """The components as the rows of a matrix, in the images' precision."""
        if self._matrix.dtype != x.dtype or self._matrix.device != x.device:
            assert self._fitted is not None
            self._matrix = self._fitted.tensors["components"][: self.components].flatten(1).to(x)
        return self._matrix


@dataclass(frozen=True)
class FiniteDifference(ProbeEstimator):
    """Differences of values on both sides of the point, along every direction of a basis.

    The estimate is the sum of ``(f(x + delta v) - f(x - delta v)) / (2 delta) v`` over the directions v. Probes are
    cut to the box and the divisor stays ``2 delta``, as in the released code: at an element on the box's edge the
    estimate is half the derivative. A value that is not known counts as no difference.

    Departures from the released code: random groups belong to the image, not to its batch; the point itself is asked
    once per estimate, not once per direction.

    Args:
        basis: the directions.
        delta: length of a probe along its direction, pixel units. The paper: 0.01 for differences of logits, 1.0 for
            probabilities (MNIST; on CIFAR-10 both in grey levels, so 0.01/255 and 1/255).
        two_sided: False asks only ``x + delta v`` and takes the value at the point for the other side.
        clip: ``box`` and ``ball`` move the probes inside, ``none`` asks them as they are.
        exact_length: divide by the length that is left between the two probes after clipping.
        block: most probes per image in one forward.

    Raises:
        ValueError: an argument out of its range.
    References:
        Bhagoji et al. 2018, https://arxiv.org/abs/1712.09491, section 3 and algorithms 1 and 2.
    """

    basis: Basis = Coordinates()
    delta: float = 0.01
    two_sided: bool = True
    clip: Literal["none", "box", "ball"] = "box"
    exact_length: bool = False
    block: int = 30  # and the point itself: whole rows fill forwards of 64, 128, 256 images

    def __post_init__(self) -> None:
        if not isinstance(self.basis, Basis):
            raise ValueError(f"basis must be Coordinates, RandomGroups or PrincipalComponents, got {self.basis!r}")
        if not 0 < self.delta < float("inf"):
            raise ValueError(f"delta must be > 0 in pixel units and finite, got {self.delta}")
        if self.clip not in ("none", "box", "ball") or self.block < 2:
            raise ValueError(f"clip must be none, box or ball and block >= 2, got {self.clip!r} and {self.block}")
        object.__setattr__(self, "paired", self.two_sided)

    @property
    def needs_fit(self) -> bool:
        """Whether the basis must still learn from training images."""
        return self.basis.needs_fit

    @property
    def fitted_on(self) -> str:
        """Hash of what the basis has learnt from."""
        return self.basis.fitted_on

    def fit(self, images: Tensor, labels: Tensor, path: str | Path | None = None) -> None:
        """Let the basis learn from training images, see :meth:`Basis.fit`."""
        self.basis.fit(images, path)

    def probes(self, shape: torch.Size) -> int:
        return self.basis.count(shape) * self._sides

    def ask(self, x: Tensor, memory: Tensor, draws: Draws, first: Tensor, out: Tensor) -> Tensor:
        sides = self._sides
        numbers = first[:, None] // sides + torch.arange(out.shape[1] // sides, device=x.device)
        told = self.basis.choose(x, draws, numbers)
        for side, amount in enumerate((self.delta, -self.delta)[:sides]):
            self.basis.shift(x, told, amount, out[:, side::sides])
        return told

    def gather(self, told: Tensor, probes: Tensor, values: Tensor, x: Tensor, value: Tensor) -> Tensor:
        values = values.double()
        if self.two_sided:
            plus, minus = probes[:, 0::2], probes[:, 1::2]
            difference = values[:, 0::2] - values[:, 1::2]
        else:
            plus, minus = probes, x.unsqueeze(1)
            difference = values - value[:, None]
        length = self.basis.along(told, plus, minus) if self.exact_length else self._sides * self.delta
        slope = (difference / length).nan_to_num(0.0, 0.0, 0.0)
        return self.basis.combine(told, slope.to(x.dtype), x)

    @property
    def _sides(self) -> int:
        return 2 if self.two_sided else 1


def principal_components(images: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C, H, W), unit components (count, C, H, W) of descending variance, and their variances (count,).

    Exact, in float64, from whichever is smaller: the covariance of the elements or the products of the images. The
    largest entry of each component is positive.

    Raises:
        ValueError: more components than the rank of the images.
    """
    flat = images.detach().flatten(1).cpu()
    varies = (flat.amax(0) > flat.amin(0)).nonzero().squeeze(1)
    mean = flat.mean(0, dtype=torch.float64)
    moving, wide = flat[:, varies], len(varies) > len(flat)
    centre = mean[varies]
    if wide:
        centred = moving.double() - centre
        square = centred @ centred.T
    else:
        square = torch.zeros(len(varies), len(varies), dtype=torch.float64)
        for part in torch.split(moving, 2048):
            block = part.double() - centre
            square.addmm_(block.T, block)
    top = min(count, len(square))
    values, vectors = _largest(square, top)
    floor = float(values.amax()) * max(flat.shape) * torch.finfo(torch.float64).eps if top else 0.0
    rank = int((values > floor).sum())
    if rank < count:
        raise ValueError(
            f"components must be at most the rank of the training images, {rank}, got {count}: lower components or fit "
            f"on more images than {len(flat)}"
        )
    rows = (centred.T @ vectors if wide else vectors).T
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    components = torch.zeros(count, flat.shape[1], dtype=torch.float64).index_copy_(1, varies, rows)
    shape = images.shape[1:]
    return mean.view(shape).float(), components.view(count, *shape).to(images.dtype), values / len(flat)


def _largest(square: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, descending, and their vectors as columns."""
    if not count:
        return square.new_zeros(0), square.new_zeros(len(square), 0)
    last = len(square) - 1
    values, vectors = scipy.linalg.eigh(square.numpy(), subset_by_index=(last - count + 1, last))
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def _places(told: Tensor, amount: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Elements to move and by how much; places that hold none (-1) move element 0 by nothing."""
    return told.clamp_min(0), (told >= 0).to(dtype).mul_(amount)


def _pick(images: Tensor, place: Tensor) -> Tensor:
    return images.flatten(2).expand(-1, place.shape[1], -1).gather(2, place)
