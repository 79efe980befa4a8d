"""How well a score tells adversarial images from clean ones: ranks and rates, no threshold's cleverness."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat


def auc(clean: Tensor, adversarial: Tensor) -> float:
    """Area under the ROC curve: P(adversarial score > clean score) + P(equal) / 2.

    The scores are ranked first, so that any strictly increasing map of them gives the same area and nothing saturates.

    Shape: clean (n,), adversarial (m,), larger scores for suspicion.

    Raises:
        ValueError: no score of either kind, or NaN.
    """
    scores = torch.cat([_sound("clean", clean), _sound("adversarial", adversarial)])
    ranks = torch.unique(scores, return_inverse=True)[1].double()
    truth = torch.arange(len(scores)) >= clean.numel()
    return float(binary_auroc(ranks / ranks.max().clamp_min(1), truth.long()))


class Estimate(NamedTuple):
    """A figure with the ends of an interval about it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auc_interval(
    clean: Tensor, adversarial: Tensor, samples: int = 1000, level: float = 0.95, seed: int = 0, paired: bool = True
) -> Estimate:
    """The area with a bootstrap interval: percentiles over resampled images.

    Where all scores are in order, or none is, every resample has the area itself, however few there are. One end is
    then a bound instead, one-sided at ``level``: the area p at which n independent pairs would all be in order with
    probability ``p ** n = 1 - level`` (0.05 ** (1 / n); for 200 pairs 0.985), or its mirror at 0.

    Args:
        samples: resamples. level: of the interval, in (0, 1).
        paired: ``adversarial[i]`` was made of ``clean[i]``; both are drawn together. False: apart from one another.

    Raises:
        ValueError: as of :func:`auc`; pairs of unequal number; an argument out of its range.
    """
    value = auc(clean, adversarial)
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples must be at least 1 and level in (0, 1), got {samples} and {level}")
    if paired and clean.numel() != adversarial.numel():
        raise ValueError(f"pairs need as many clean as adversarial scores, got {clean.numel()}, {adversarial.numel()}")
    bound = (1 - level) ** (1 / min(clean.numel(), adversarial.numel()))
    if clean.max() < adversarial.min():
        return Estimate(1.0, bound, 1.0)
    if adversarial.max() < clean.min():
        return Estimate(0.0, 0.0, 1 - bound)
    scores = torch.cat([clean.double().cpu().flatten(), adversarial.double().cpu().flatten()]).numpy()
    n, m = clean.numel(), adversarial.numel()
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    group = np.cumsum(np.r_[True, ranked[1:] != ranked[:-1]]) - 1  # equal scores share a group
    draw = np.random.default_rng(seed)
    areas = np.empty(samples)
    for number in range(samples):
        first = draw.integers(0, n, n)
        second = first if paired else draw.integers(0, m, m)
        times = np.zeros(n + m)
        np.add.at(times, first, 1)
        np.add.at(times, n + second, 1)
        times = times[order]
        negative = np.bincount(group, np.where(order < n, times, 0))
        positive = np.bincount(group, np.where(order < n, 0, times))
        areas[number] = (positive * (np.cumsum(negative) - negative / 2)).sum() / (negative.sum() * positive.sum())
    tail = (1 - level) / 2
    low, high = np.quantile(areas, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def threshold_at(clean: Tensor, false_alarms: float) -> float:
    """The least score above which at most that share of the clean images given lies.

    Args:
        clean: (n,) scores of held-out clean images, not of those that are tested afterwards.
        false_alarms: allowed share, in [0, 1).

    Raises:
        ValueError: a share out of its range; no score, or NaN.
    """
    if not 0 <= false_alarms < 1:
        raise ValueError(f"false_alarms must lie in [0, 1), got {false_alarms}")
    scores = _sound("clean", clean).sort().values
    above = int(false_alarms * len(scores) + 1e-9)
    return float(scores[len(scores) - 1 - above])


def share_above(scores: Tensor, threshold: float) -> float:
    """Share of the scores above a threshold, strictly: false alarms of clean images, detections of adversarial ones."""
    return float((_sound("scores", scores) > threshold).double().mean())


class PairedAuc(Metric):
    """Area under the ROC curve over pairs of a clean and an adversarial image, each pair once."""

    full_state_update = False
    place: list[Tensor]
    clean: list[Tensor]
    adversarial: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("place", "clean", "adversarial"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, clean: Tensor, adversarial: Tensor, place: Tensor) -> None:
        """Note the scores of pairs.

        Shape: clean, adversarial and place (n,): places in the data set, one for each pair.
        """
        self.place.append(place)
        self.clean.append(clean.detach().double())
        self.adversarial.append(adversarial.detach().double())

    def compute(self) -> Tensor:
        """The area, over the pairs seen on all processes."""
        place, order = dim_zero_cat(self.place).sort(stable=True)
        first = torch.ones_like(place, dtype=torch.bool)
        first[1:] = place[1:] != place[:-1]
        clean, adversarial = (dim_zero_cat(part)[order][first].cpu() for part in (self.clean, self.adversarial))
        return torch.tensor(auc(clean, adversarial), device=place.device)


def _sound(name: str, scores: Tensor) -> Tensor:
    scores = scores.detach().double().cpu().flatten()
    if not len(scores):
        raise ValueError(f"there are no {name} scores: an area under the ROC curve needs images of both kinds")
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} of {len(scores)} {name} scores are NaN, which has no rank")
    return scores
