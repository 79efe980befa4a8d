"""What an attacker reaches without asking anything: one random step, or one step towards another class's mean."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.draws import Draws
from lit_adv.fitted import Fitted, fit_or_read, read_fit
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel


class RandomNoise(IterativeAttack):
    """One step of the whole radius along the signs of Gaussian noise (l2: along the noise), cut to the box.

    It asks nothing; the one query, whether the image found is adversarial, is a check.

    Args:
        threat: norm (linf, l2), radius and box.
        stop_at_hit: False steps off images that are wrong already, too.
        seed: of the noise.

    Raises:
        ValueError: another norm, or no finite radius.
    References:
        Bhagoji et al. 2018, https://arxiv.org/abs/1712.09491 (baseline "Rand.").
    """

    access = Access.LABEL
    looks_first = True
    steps = 1

    def __init__(
        self,
        threat: ThreatModel = ThreatModel(),  # noqa: B008 - frozen
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        _check_rule(threat, type(self).__name__)
        self.threat, self.stop_at_hit, self.seed = threat, stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return 0

    def start(self, search: Search, rows: Tensor) -> State:
        return State(**search.fresh(rows))

    def step(self, search: Search, state: State) -> State:
        state.x = _noisy(self.threat, state.x, search.draws(state), self.threat.radius)
        return state


class DifferenceOfMeans(IterativeAttack):
    """One step of the whole radius along the signs of the difference of two class means (l2: along it).

    The means are those of training images. The step leads from the mean of the image's class to that of the target or,
    untargeted, to the nearest other mean (l2). Elements in which the two agree do not move. It asks nothing; the one
    query, whether the image found is adversarial, is a check.

    Departures: means of training images, where the released code takes those of the images under attack.

    Args:
        threat: norm (linf, l2), radius and box.
        noise: length of a random step before, as in :class:`RandomNoise`; the rest of the radius is left for the
            means. Pixel units, from 0 to the radius.
        path: safetensors file written by :meth:`fit`; None: :meth:`fit` must be called.
        stop_at_hit: False steps off images that are wrong already, too.
        seed: of the noise.

    Raises:
        ValueError: an argument out of its range, or a file that cannot be read.
    References:
        Bhagoji et al. 2018, https://arxiv.org/abs/1712.09491 (baseline "Difference of means").
    """

    access = Access.LABEL
    looks_first = True
    steps = 1

    def __init__(
        self,
        threat: ThreatModel = ThreatModel(),  # noqa: B008 - frozen
        noise: float = 0.0,
        path: Path | None = None,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        _check_rule(threat, type(self).__name__)
        if not 0 <= noise <= threat.radius:
            raise ValueError(f"noise must lie between 0 and the radius, {threat.radius:g}, got {noise}")
        self.threat, self.noise, self.path = threat, noise, path
        self.stop_at_hit, self.seed = stop_at_hit, seed
        self._fitted: Fitted | None = None
        if path is not None:
            self._take(read_fit(path))

    @property
    def needs_fit(self) -> bool:
        """Whether it must still learn from training images."""
        return self._fitted is None

    @property
    def fitted_on(self) -> str:
        """Hash of what it has learnt from; empty before."""
        return "" if self._fitted is None else self._fitted.source

    def fit(self, images: Tensor, labels: Tensor, path: str | Path | None = None) -> None:
        """Take the means of the classes of training images (N, C, H, W).

        Args:
            path: file that keeps them: read where it stems from these very images, else written.

        Raises:
            ValueError: bad images or labels.
        """
        self._take(fit_or_read(path, images, labels, "class means", lambda: class_means(images, labels)))

    def _take(self, fitted: Fitted) -> None:
        if not {"means", "images"} <= fitted.tensors.keys() or fitted.tensors["means"].dim() != 4:
            raise ValueError(
                f"path must hold class means (K, C, H, W), got {sorted(fitted.tensors)} in {self.path}: leave it out "
                "and call attack.fit(images, labels)"
            )
        self._fitted = fitted

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        means = self._learnt()[0]
        if means.shape[1:] != shape:
            raise ValueError(
                f"the class means are those of images {tuple(means.shape[1:])}, but the images under attack are "
                f"{tuple(shape)}: fit them on images like these"
            )
        return 0

    def start(self, search: Search, rows: Tensor) -> State:
        fields = search.fresh(rows)
        present = self._learnt()[1].to(rows.device) > 0
        for name in ("y", "target"):
            value = fields[name]
            if value is not None and len(value):
                _check_present(name, value, present)
        return State(**fields)

    def step(self, search: Search, state: State) -> State:
        means, images = (part.to(state.x.device) for part in self._learnt())
        target = nearest_class(means, images > 0)[state.y] if state.target is None else state.target
        x = state.x
        if self.noise:
            x = _noisy(self.threat, x, search.draws(state), min(self.noise, self.threat.radius))
        towards = self.threat.steepest((means[target] - means[state.y]).to(x.dtype))
        state.x = self.threat.project(x + max(0.0, self.threat.radius - self.noise) * towards, state.x0)
        return state

    def _learnt(self) -> tuple[Tensor, Tensor]:
        """The means (K, C, H, W), and of how many images each (K,)."""
        if self._fitted is None:
            raise ValueError(
                "DifferenceOfMeans has learnt nothing yet: call attack.fit(images, labels) with training images, or "
                "name a fitted file as path"
            )
        return self._fitted.tensors["means"], self._fitted.tensors["images"]


def class_means(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean image of each class (K, C, H, W), zero where there is none, and how many images it is the mean of (K,)."""
    if int(labels.min()) < 0:
        raise ValueError(f"labels holds the negative class {int(labels.min())}: give class indices from 0")
    images, labels = images.detach().cpu(), labels.long().cpu()
    count = labels.bincount()
    if int((count > 0).sum()) < 2:
        raise ValueError(f"labels must name at least two classes, got only class {int(labels[0])}")
    total = torch.zeros(len(count), *images.shape[1:], dtype=torch.float64)
    for part, classes in zip(torch.split(images, 4096), torch.split(labels, 4096), strict=True):
        total.index_add_(0, classes, part.double())
    return {"means": total / count.clamp_min(1).view(-1, 1, 1, 1), "images": count}


def nearest_class(means: Tensor, present: Tensor) -> Tensor:
    """For each class the other one with the nearest mean (l2) among those present: (K,)."""
    flat = means.flatten(1)
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.masked_fill(~present, torch.inf).fill_diagonal_(torch.inf).argmin(1)


def _noisy(threat: ThreatModel, x: Tensor, draws: Draws, length: float) -> Tensor:
    """A step of some length along random signs (l2: a random direction) from images, cut to ball and box."""
    noise = draws.normal(*x.shape[1:], dtype=x.dtype)
    return threat.project(x + length * threat.steepest(noise), x)


def _check_rule(threat: ThreatModel, name: str) -> None:
    check_threat(threat)
    if threat.norm not in ("linf", "l2"):
        raise ValueError(f"{name} has rules for linf and l2, got norm {threat.norm!r}: choose one of them")
    if threat.radius == float("inf"):
        raise ValueError("eps must be finite, got inf: the step is as long as the radius")


def _check_present(name: str, value: Tensor, present: Tensor) -> None:
    known = value < len(present)
    known &= present[value.clamp_max(len(present) - 1)]
    if not known.all():
        raise ValueError(
            f"{name} holds class {int(value[~known][0])}, of which the training images held none, so that it has no "
            "mean: fit on images of all classes"
        )
