"""Measures of an attack, as plain functions of its records.

Definitions, stated here once:

- An image is *wrong at first* if the model misclassifies it clean. It is never attacked; it counts as broken
  at distance 0 with no query, and never as a success. All other images are *attacked*.
- A *success* is an attacked image whose adversarial image an independent second pass confirms (``verified``;
  for a random model, adversarial in more than half of the fresh draws). ``claimed``: what the attack itself
  says; ``rounded``: a success that survives rounding to 8 bits; ``any`` and ``mean``: adversarial in any
  draw, share of the draws.
- *Clean accuracy* and *robust accuracy* are over all images; robust: right at first and no success.
- *Success rates* are over attacked images. *Success over all* is 1 - robust accuracy: its numerator also
  counts images wrong at first.
- *Queries*, *checks*, *iterations* and *norms* are over successes; of *attacked*: over all attacked images, failures
  with all they cost and with the last image tried. Queries are all that an image cost, checks those of them that a
  paper's arithmetic leaves out: its number is their difference. ``first_hit`` is what had been spent when it was
  first adversarial. *Curves* give the share of attacked images whose
  first hit came within so many queries or steps: the denominator is fixed, and failures never arrive.
- A rate or mean over nothing is None, never 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_adv.metrics.records import Records

_QUANTILES = (0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a share, both ends in [0, 1]."""

    low: float
    high: float


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test of two attacks on the same images.

    Args:
        b: Images that only the first attack broke.
        c: Images that only the second attack broke.
        n: Images compared, right at first in both.
        p: Two-sided p value of equal success, None if no image could be compared.
    """

    b: int
    c: int
    n: int
    p: float | None


@dataclass(frozen=True)
class Summary:
    """The measures of one attack, defined at the top of the module: rates in [0, 1], None if undefined.

    ``immediate`` counts successes that took no step at all: for a random model they are errors on the clean
    image rather than attacks.
    """

    images: int
    wrong_at_first: int
    attacked: int
    successes: int
    clean_accuracy: float | None
    robust_accuracy: float | None
    robust_interval: Interval | None
    claimed_success_rate: float | None
    success_rate: float | None
    success_interval: Interval | None
    rounded_success_rate: float | None
    any_success_rate: float | None
    mean_success_rate: float | None
    success_over_all: float | None
    mean_queries: float | None
    median_queries: float | None
    query_quantiles: dict[str, float] | None
    mean_first_hit: float | None
    median_first_hit: float | None
    mean_checks: float | None
    total_queries: int
    mean_iterations: float | None
    median_iterations: float | None
    mean_distance: float | None
    median_distance: float | None
    mean_l2: float | None
    mean_linf: float | None
    median_l2: float | None
    median_linf: float | None
    immediate: int
    mean_queries_of_attacked: float | None
    mean_checks_of_attacked: float | None
    mean_l2_of_attacked: float | None
    mean_linf_of_attacked: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the measures as a dict ready for JSON."""
        return asdict(self)


def successes(records: Records) -> Tensor:
    """Return which images are successes, (n,) bool: right at first and confirmed by the second pass."""
    return records.clean_correct & records.verified


def first_hits(records: Records) -> Tensor:
    """Return the queries at the first hit, (n,) int64; all its queries where no hit was noted."""
    return torch.where(records.first_hit >= 0, records.first_hit, records.queries)


def clean_accuracy(records: Records) -> float | None:
    """Return the share of all images that are classified rightly before the attack."""
    return _mean(records.clean_correct)


def robust_accuracy(records: Records) -> float | None:
    """Return the share of all images that are right at first and not broken by the attack."""
    return _mean(records.clean_correct & ~records.verified)


def success_over_all(records: Records) -> float | None:
    """Return the share of all images that are wrong at first or broken: 1 - robust accuracy."""
    return _mean(~records.clean_correct | records.verified)


def success_rate(records: Records) -> float | None:
    """Return the share of attacked images that are successes."""
    return _mean(records.verified[records.clean_correct])


def claimed_success_rate(records: Records) -> float | None:
    """Return the share of attacked images on which the attack says it succeeded."""
    return _mean(records.claimed[records.clean_correct])


def rounded_success_rate(records: Records) -> float | None:
    """Return the share of attacked images that are successes and stay so after rounding to 8 bits."""
    return _mean((records.verified & records.rounded)[records.clean_correct])


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Wilson's score interval of a share.

    Args:
        k: Number of hits, in [0, n].
        n: Number of trials; 0 gives None.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: If k or the confidence lie outside their range.

    References:
        E. B. Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in [0, n = {n}], got {k}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    if n == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return Interval(0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half)


def queries_curve(records: Records) -> tuple[Tensor, Tensor]:
    """Return success against queries, a step function.

    Shape:
        Output: x (m,) int64, queries spent, rising from 0 to the most any image cost; y (m,) float64, share
        of attacked images whose first hit came within x queries. Both empty if no image was attacked.
    """
    return _curve(records, first_hits(records), records.queries)


def iterations_curve(records: Records) -> tuple[Tensor, Tensor]:
    """Return success against iterations, a step function; as ``queries_curve``."""
    return _curve(records, records.iterations, records.iterations)


def _curve(records: Records, hits: Tensor, spent: Tensor) -> tuple[Tensor, Tensor]:
    attacked = int(records.clean_correct.sum())
    if not attacked:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    hits = hits[successes(records)].sort().values
    end = torch.cat([spent[records.clean_correct], hits]).max()
    x = torch.tensor(sorted({0, int(end), *hits.tolist()}))
    return x, torch.searchsorted(hits, x, right=True).double() / attacked


def mcnemar(a: Records, b: Records) -> McNemar:
    """Compare two attacks, or one attack on two models, by McNemar's exact test.

    Images are paired by index; those wrong at first in either are left out.

    References:
        Q. McNemar, 1947, https://doi.org/10.1007/BF02295996
    """
    first, second = common([a, b])
    both = first.clean_correct & second.clean_correct
    only_first = int((both & first.verified & ~second.verified).sum())
    only_second = int((both & second.verified & ~first.verified).sum())
    n = int(both.sum())
    if not n or not only_first + only_second:
        return McNemar(only_first, only_second, n, 1.0 if n else None)
    from scipy.stats import binomtest

    p = float(binomtest(only_first, only_first + only_second, 0.5).pvalue)
    return McNemar(only_first, only_second, n, p)


def common(parts: Sequence[Records]) -> list[Records]:
    """Return each of several records on the images that all have, one row per index, sorted by it."""
    tables = [part.unique() for part in parts]
    if not tables:
        return []
    shared = tables[0].index
    for table in tables[1:]:
        shared = shared[torch.isin(shared, table.index)]
    return [table[torch.isin(table.index, shared)] for table in tables]


def worst_case(parts: Sequence[Records]) -> Records:
    """Return, for each image that all attacks saw, the row of the attack that did worst by the defender.

    That is the one with a verified success, then one that survives rounding, then one claimed, then the
    highest share of draws, the smallest distance, the fewest queries, the first. An image wrong at first for
    any is so here; ``any`` and ``mean`` are the highest of all attacks.

    Args:
        parts: Records of several attacks on one model; none give empty records.
    """
    parts = common(parts)
    if not parts:
        return Records.empty()
    columns = {name: torch.stack([part.columns()[name] for part in parts]) for name in parts[0].columns()}
    keys = [columns["queries"], columns["distance"], -columns["verified_mean"]]
    keys += [~columns[name] for name in ("claimed", "rounded", "verified")]
    worst = torch.from_numpy(np.lexsort([key.double().numpy() for key in keys], axis=0)[:1].copy())
    chosen = {name: column.gather(0, worst)[0] for name, column in columns.items()}
    chosen["clean_correct"] = columns["clean_correct"].all(dim=0)
    chosen["verified_any"] = columns["verified_any"].any(dim=0)
    chosen["verified_mean"] = columns["verified_mean"].amax(dim=0)
    return Records(**chosen)


def summarize(records: Records) -> Summary:
    """Compute all measures of one attack.

    Args:
        records: One row per image of the evaluated set, those wrong at first included.
    """
    attacked, hit = records[records.clean_correct], records[successes(records)]
    robust = len(attacked) - len(hit)
    hits = first_hits(hit)
    return Summary(
        images=len(records),
        wrong_at_first=len(records) - len(attacked),
        attacked=len(attacked),
        successes=len(hit),
        clean_accuracy=clean_accuracy(records),
        robust_accuracy=robust_accuracy(records),
        robust_interval=wilson(robust, len(records)),
        claimed_success_rate=claimed_success_rate(records),
        success_rate=success_rate(records),
        success_interval=wilson(len(hit), len(attacked)),
        rounded_success_rate=rounded_success_rate(records),
        any_success_rate=_mean(attacked.verified_any),
        mean_success_rate=_mean(attacked.verified_mean),
        success_over_all=success_over_all(records),
        mean_queries=_mean(hit.queries),
        median_queries=_median(hit.queries),
        query_quantiles=_quantiles(hit.queries),
        mean_first_hit=_mean(hits),
        median_first_hit=_median(hits),
        mean_checks=_mean(hit.checks),
        total_queries=int(records.queries.sum()),
        mean_iterations=_mean(hit.iterations),
        median_iterations=_median(hit.iterations),
        mean_distance=_mean(hit.distance),
        median_distance=_median(hit.distance),
        mean_l2=_mean(hit.l2),
        mean_linf=_mean(hit.linf),
        median_l2=_median(hit.l2),
        median_linf=_median(hit.linf),
        immediate=int((hit.iterations == 0).sum()),
        mean_queries_of_attacked=_mean(attacked.queries),
        mean_checks_of_attacked=_mean(attacked.checks),
        mean_l2_of_attacked=_mean(attacked.l2),
        mean_linf_of_attacked=_mean(attacked.linf),
    )


def _mean(values: Tensor) -> float | None:
    mean = float(values.double().mean()) if len(values) else math.nan
    return mean if math.isfinite(mean) else None


def _median(values: Tensor) -> float | None:
    return float(np.median(values.numpy())) if len(values) else None


def _quantiles(values: Tensor) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.quantile(values.numpy(), _QUANTILES)
    return {f"{q:g}": float(value) for q, value in zip(_QUANTILES, found, strict=True)}
