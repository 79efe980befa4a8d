"""Queries to success from several starts of NAttack, compared image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lit_adv.metrics import Records, wilson

USUAL = "init_std 0.001"
FALL, LEAST = 0.2, 200
"""The goal: so much fewer queries, over so many images at least."""

HEADS = (
    "start", "images", "success", "95 % interval", "mean queries to success", "median", "mean iterations", "median",
    "processor s an image", "both break", "queries / usual start's", "95 % interval", "p (Wilcoxon)",
)  # fmt: skip
PAPER = (
    ("paper: NATTACK, Randomization, ImageNet, N 40", "100", "82 %", "70.77 (seconds)"),
    ("paper: NATTACK-R, the same", "100", "91.9 %", "48.22 (seconds)"),
    ("paper: BPDA, the same", "100", "", "3.51 (seconds)"),
)


@dataclass(frozen=True)
class Found:
    """What one start led to: the records of its images, and own processor seconds, None where resumed."""

    name: str
    records: Records
    seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """Queries to success of two starts over the images that both break.

    Args:
        n: such images. ratio: of the means, with a bootstrap interval. p: of Wilcoxon's signed-rank test, None where
            all are equal or there are none.
    """

    n: int
    ratio: float
    low: float
    high: float
    p: float | None


def rows(found: Sequence[Found]) -> list[list[str]]:
    """The table's rows, and the paper's."""
    usual = next(result for result in found if result.name == USUAL)
    table = []
    for result in found:
        attacked = result.records[result.records.clean_correct]
        broken = attacked[attacked.verified]
        rate = wilson(len(broken), len(attacked))
        cells = [
            result.name,
            f"{len(attacked)}",
            f"{100 * len(broken) / len(attacked):.1f} %" if len(attacked) else "",
            "" if rate is None else f"{100 * rate.low:.1f} to {100 * rate.high:.1f}",
            *(_middle(broken.first_hit, 0) + _middle(broken.iterations, 1)),
            "" if result.seconds is None else f"{result.seconds / max(1, len(result.records)):.3f}",
        ]
        told = compared(result.records, usual.records) if result is not usual else None
        table.append(cells + (["", "", "", ""] if told is None else _told(told)))
    for name, images, success, seconds in PAPER:
        table.append([name, images, success, "", "", "", "", "", seconds, "", "", "", ""])
    return table


def compared(ours: Records, usual: Records, draws: int = 10_000, seed: int = 0) -> Comparison | None:
    """Queries to success over the images that both break; None where there are none."""
    from scipy.stats import wilcoxon

    mine, theirs = ({int(i): int(q) for i, q in _hits(records)} for records in (ours, usual))
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return None
    a, b = (np.array([hits[index] for index in both], dtype=np.float64) for hits in (mine, theirs))
    chosen = np.random.default_rng(seed).integers(len(both), size=(draws, len(both)))
    ratios = a[chosen].mean(1) / b[chosen].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    p = None if (a == b).all() else float(wilcoxon(a, b, method="asymptotic").pvalue)
    return Comparison(len(both), float(a.mean() / b.mean()), float(low), float(high), p)


def goals(found: Sequence[Found]) -> list[str]:
    """Whether each start from S reaches the goal."""
    usual = next(result for result in found if result.name == USUAL)
    told = []
    for result in found:
        if not result.name.startswith("S"):
            continue
        pair = compared(result.records, usual.records)
        if pair is None:
            told.append(f"goal, {result.name}: no image that both starts break")
            continue
        few = f"; not judged, for fewer than {LEAST} images say little" if pair.n < LEAST else ""
        verdict = few or (": met" if pair.ratio <= 1 - FALL else ": MISSED")
        told.append(
            f"goal, {result.name}: mean queries to success lower by {100 * FALL:.0f} % or more; they are "
            f"{100 * (pair.ratio - 1):+.1f} % (n {pair.n}){verdict}"
        )
        told += _beside(result, [other for other in found if other is not usual and not other.name.startswith("S")])
    return told


def _beside(result: Found, others: Sequence[Found]) -> list[str]:
    """A start from S against random ones of other sizes, whose size nobody has tuned as S's factor was."""
    pairs = [(other.name, compared(result.records, other.records)) for other in others]
    return [
        f"{result.name} against {name}: {100 * (pair.ratio - 1):+.1f} % queries ({100 * (pair.low - 1):+.1f} to "
        f"{100 * (pair.high - 1):+.1f}, n {pair.n})"
        for name, pair in pairs
        if pair is not None
    ]


def _hits(records: Records) -> list[tuple[int, int]]:
    broken = records[records.clean_correct & records.verified]
    return list(zip(broken.index.tolist(), broken.first_hit.tolist(), strict=True))


def _middle(values: torch.Tensor, digits: int) -> list[str]:
    if not len(values):
        return ["", ""]
    return [f"{values.double().mean():,.{digits}f}", f"{values.double().quantile(0.5):,.0f}"]


def _told(pair: Comparison) -> list[str]:
    p = "" if pair.p is None else f"{pair.p:.2g}"
    return [f"{pair.n}", f"{pair.ratio:.3f}", f"{pair.low:.3f} to {pair.high:.3f}", p]
