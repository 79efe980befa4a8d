"""The audit's checks as plain functions: of attacks' records, or of what probes have measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_adv.audit import THRESHOLDS, Finding, Thresholds, judged, skipped
from lit_adv.metrics.records import Records
from lit_adv.metrics.summary import (
    clean_accuracy,
    common,
    mcnemar,
    robust_accuracy,
    success_rate,
    successes,
    worst_case,
)
from lit_adv.outcome import RESTLESS, Outcome, Stage
from lit_adv.tables import percent


def of_records(group: Sequence[Outcome], limits: Thresholds = THRESHOLDS) -> list[Finding]:
    """What the records of the attacks on one model under one threat model tell by themselves."""
    found = [black_box(group, limits), above_clean(group, limits), unverified(group, limits)]
    found += unlimited(group, limits)
    if not any(is_random(outcome) for outcome in group):
        found.append(skipped("null", "the model is not random"))
    if any(RESTLESS in outcome.counts for outcome in group):
        found.append(Finding("repeats", "WARN", "the first look noticed that the same images get different answers"))
    return found


def is_random(outcome: Outcome) -> bool:
    """Whether the model draws random numbers, said or noticed."""
    return outcome.stochastic or RESTLESS in outcome.counts


class _Duel(NamedTuple):
    """A black-box attack beside the white-box ones that it may be compared with, on images that all saw."""

    black: Outcome
    white: Outcome
    attacked: set[int]
    alone: set[int]
    left: float
    best: float
    seen: int


def black_box(group: Sequence[Outcome], limits: Thresholds = THRESHOLDS) -> Finding:
    """Black-box attacks break what white-box ones do not; in a cascade, what those before them have left.

    Without a radius all break everything: there the question is who does within the median distance of the nearest.
    """
    group, within = _within_reach(group)
    duels = [duel for outcome in group if (duel := _duel(outcome, group)) is not None]
    late = [(stage.broken / stage.seen, told) for outcome in group for stage, told in _late(outcome)]
    if not duels and not late:
        missing = "black-box" if any(outcome.access == "gradient" for outcome in group) else "white-box"
        return skipped("black_box", f"there is no {missing} attack to compare under this threat model")
    said, warn, n, p = [], False, 0, None
    figures: dict[str, float | None] = {}
    if duels:
        first = min(duels, key=lambda duel: duel.left - duel.best)
        alone = set[int]().union(*(duel.alone for duel in duels))
        n = len(set[int]().union(*(duel.attacked for duel in duels)))
        p = mcnemar(first.black.records, first.white.records).p
        unique = len(alone) / n
        figures = {"black_left": first.left, "white_left": first.best, "unique": unique}
        warn = unique > limits.unique or first.left < first.best
        said.append(
            f"{first.black.name} leaves {percent(first.left)} %, {first.white.name} {percent(first.best)} % of the "
            f"same {first.seen:,} images; black-box attacks alone broke {len(alone)} of {n:,}{within}"
        )
    if late:
        share = max(share for share, _ in late)
        figures["late"] = share
        warn = warn or share > limits.unique
        said += [told for _, told in late]
        n = n or max(stage.seen for outcome in group for stage, _ in _late(outcome))
    return judged("black_box", warn, "; ".join(said), n, figures, p)


def _within_reach(group: Sequence[Outcome]) -> tuple[Sequence[Outcome], str]:
    """Attacks without a radius, judged at the median distance of the nearest successes; others as they are."""
    worst = worst_case([outcome.records for outcome in group])
    near = worst.distance[successes(worst)]
    if not math.isinf(group[0].eps) or not len(near):
        return group, ""
    radius = float(near.median()) * (1 + 1e-4)
    cut = [replace(o.records, verified=o.records.verified & (o.records.distance <= radius)) for o in group]
    judged_there = [replace(outcome, records=records) for outcome, records in zip(group, cut, strict=True)]
    return judged_there, f" (within {radius:.4g}, the median distance of the nearest)"


def _duel(black: Outcome, group: Sequence[Outcome]) -> _Duel | None:
    """An untargeted attack has the easier task: that it beats a targeted one says nothing."""
    whites = [o for o in group if o.access == "gradient" and (is_targeted(black) or not is_targeted(o))]
    if black.access == "gradient" or not whites:
        return None
    mine = black.records
    seen = torch.isin(mine.index, torch.cat([white.records.index for white in whites]))
    known = torch.isin(mine.index, torch.cat([white.records.index[successes(white.records)] for white in whites]))
    attacked = mine.clean_correct & seen
    if not attacked.any():
        return None
    left: dict[int, tuple[float, float, int]] = {}
    for place, white in enumerate(whites):
        ours, theirs = common([mine, white.records])
        if len(ours):
            left[place] = robust_accuracy(ours) or 0.0, robust_accuracy(theirs) or 0.0, len(ours)
    best = min(left, key=lambda place: left[place][1])
    alone = attacked & mine.verified & ~known
    return _Duel(black, whites[best], set(mine.index[attacked].tolist()), set(mine.index[alone].tolist()), *left[best])


def _late(outcome: Outcome) -> list[tuple[Stage, str]]:
    """The black-box stages of a cascade that came after white-box ones, each with what it found."""
    found, before = [], list[str]()
    for stage in outcome.stages:
        if stage.access == "gradient":
            before.append(stage.name)
        elif before and stage.seen:
            told = f"{stage.name} broke {stage.broken:,} of {stage.seen:,} images that {', '.join(before)} had left"
            found.append((stage, told))
    return found


def is_targeted(outcome: Outcome) -> bool:
    """Whether the attack had target classes."""
    return bool((outcome.records.target >= 0).any())


def above_clean(group: Sequence[Outcome], limits: Thresholds = THRESHOLDS) -> Finding:
    """Robust accuracy under any attack against the lowest clean accuracy, on images that all saw."""
    parts = common([outcome.records for outcome in group])
    if not parts or not len(parts[0]):
        return skipped("above_clean", "there is no image that all attacks saw")
    clean = min(clean_accuracy(part) or 0.0 for part in parts)
    robust = max(robust_accuracy(part) or 0.0 for part in parts)
    said = f"clean accuracy {percent(clean)} %, robust accuracy {percent(robust)} % against the weakest attack"
    warn = robust - clean > limits.above_clean
    return judged("above_clean", warn, said, len(parts[0]), {"clean": clean, "robust": robust})


def unverified(group: Sequence[Outcome], limits: Thresholds = THRESHOLDS) -> Finding:
    """Share of the claimed successes that an independent second pass does not confirm; the worst attack decides."""
    told, warn, figures, n = [], False, dict[str, float | None](), 0
    for outcome in group:
        claimed = outcome.records.clean_correct & outcome.records.claimed
        times = int(claimed.sum())
        if not times:
            continue
        lost = int((claimed & ~outcome.records.verified).sum())
        limit = limits.unverified_random if is_random(outcome) else limits.unverified
        n, warn = n + times, warn or lost / times > limit
        figures[outcome.name] = lost / times
        told += [f"{outcome.name} {lost:,} of {times:,}"] if lost else []
    if not n:
        return skipped("unverified", "no attack claims a success")
    said = f"claimed successes that failed verification: {', '.join(told)}" if told else f"all {n:,} claims hold"
    return judged("unverified", warn, said, n, figures)


def single_step(one: Records, many: Records, steps: int, limits: Thresholds = THRESHOLDS) -> Finding:
    """One step of the whole radius against many small ones."""
    first, second, n = _shares(one, many)
    if not first + second:
        return skipped("single_step", f"neither one step nor {steps} broke any of {n} images")
    said = f"one step broke {percent(first)} %, {steps} steps {percent(second)} %"
    warn = first - second > limits.single_step
    return judged("single_step", warn, said, n, {"one": first, "many": second}, mcnemar(one, many).p)


def growth(tried: Sequence[tuple[float, Records]], limits: Thresholds = THRESHOLDS) -> Finding:
    """Success at growing radii, (radius, records) in order; the worst loss between neighbours decides."""
    pairs = list(itertools.pairwise(tried))
    lost = [_shares(near, far)[0] - _shares(near, far)[1] for (_, near), (_, far) in pairs]
    worst = max(range(len(pairs)), key=lambda place: lost[place])
    (_, near), (_, far) = pairs[worst]
    shares = [success_rate(records) or 0.0 for _, records in tried]
    if not any(shares):
        return skipped("growth", f"nothing was broken at any radius up to {tried[-1][0]:.4g}")
    said = ", ".join(f"{percent(share)} % at {radius:.4g}" for (radius, _), share in zip(tried, shares, strict=True))
    n = int(near.clean_correct.sum())
    figures = {f"{radius:.4g}": share for (radius, _), share in zip(tried, shares, strict=True)}
    return judged("growth", lost[worst] > limits.growth, f"broken: {said}", n, figures, mcnemar(near, far).p)


def everything(records: Records, steps: int, limits: Thresholds = THRESHOLDS) -> Finding:
    """Success at a radius at which nothing should be left."""
    share = success_rate(records) or 0.0
    n = int(records.clean_correct.sum())
    said = f"{steps} steps broke {percent(share)} % at linf 0.5"
    return judged("everything", share < limits.everything, said, n, {"broken": share})


def unlimited(group: Sequence[Outcome], limits: Thresholds = THRESHOLDS) -> list[Finding]:
    """Success of white-box attacks that have no radius: nothing should be left there either."""
    free = [o for o in group if o.access == "gradient" and math.isinf(o.eps) and not is_targeted(o)]
    whites = [outcome for outcome in free if outcome.records.clean_correct.any()]
    if not whites:
        return []
    shares = {outcome.name: success_rate(outcome.records) or 0.0 for outcome in whites}
    said = "without a radius " + ", ".join(f"{name} broke {percent(share)} %" for name, share in shares.items())
    n = min(int(outcome.records.clean_correct.sum()) for outcome in whites)
    return [judged("everything", min(shares.values()) < limits.everything, said, n, dict(shares))]


def blind(sizes: Mapping[str, Tensor], limits: Thresholds = THRESHOLDS) -> Finding:
    """Images whose input gradient, of this l1 norm (n,) for each loss, is 0 or not finite; the worst loss decides."""
    told, figures, n = [], dict[str, float | None](), 0
    for loss, size in sizes.items():
        zero, lost, n = int((size == 0).sum()), int((~size.isfinite()).sum()), len(size)
        told.append(f"{loss}: exactly 0 for {zero}, not finite for {lost}")
        figures[loss] = (zero + lost) / n
    warn = max(share or 0.0 for share in figures.values()) > limits.blind
    return judged("blind", warn, f"{'; '.join(told)} of {n} clean images", n, figures)


def gain(
    short: Records,
    long: Records,
    again: Records,
    steps: tuple[int, int],
    restarts: int,
    reported: tuple[Tensor, Tensor] | None,
    limits: Thresholds = THRESHOLDS,
) -> Finding:
    """What more steps and more restarts break beyond fewer, and whether the report's white-box attacks broke it too.

    No warning where the report covers every image that the longer probes broke.

    Args:
        short, long, again: records with few steps, with many, and with few in several starts.
        steps: few and many. restarts: starts.
        reported: places of images that the report's untargeted white-box attacks saw, and whether they broke them;
            None: there is no such attack.
    """
    (first, more, n), (_, anew, _) = _shares(short, long), _shares(short, again)
    by_steps, by_restarts = (round(n * (share - first)) / n if n else 0.0 for share in (more, anew))
    stronger = long if by_steps >= by_restarts else again
    said = (
        f"{steps[0]} steps broke {percent(first)} %, {steps[1]} steps {percent(more)} %, {steps[0]} steps in "
        f"{restarts} starts {percent(anew)} %"
    )
    warn = max(by_steps, by_restarts) > limits.gain
    missed: float | None = None
    if reported is not None:
        broke = long.index[successes(long)].tolist() + again.index[successes(again)].tolist()
        seen = dict(zip(reported[0].tolist(), reported[1].tolist(), strict=True))
        left = {place for place in broke if place in seen and not seen[place]}
        covered = all(place in seen for place in broke) and not left
        missed = len(left) / n if n else 0.0
        warn = (warn and not covered) or missed > limits.gain
        said += f"; of these images the report's white-box attacks left {len(left)}"
    figures = {"steps": by_steps, "restarts": by_restarts, "missed": missed}
    return judged("gain", warn, said, n, figures, mcnemar(short, stronger).p)


def repeats(first: Tensor, again: Tensor, limits: Thresholds = THRESHOLDS) -> Finding:
    """Two answers (n, K), or labels (n,), to the same images; NaN twice counts as the same."""
    n = len(first)
    if not first.is_floating_point():
        changed = int((first != again).sum())
        return judged("repeats", changed > 0, f"{changed} of {n} labels changed", n, {"labels": changed / n})
    difference = relative(first, again)
    changed = int((first.argmax(1) != again.argmax(1)).sum())
    said = f"asked twice, answers differ by {difference:.2g} of the largest logit, and {changed} of {n} labels changed"
    return judged("repeats", difference > limits.repeats, said, n, {"difference": difference, "labels": changed / n})


def surrogate(gentle: Tensor, deployed: Tensor, limits: Thresholds = THRESHOLDS) -> Finding:
    """The surrogate's answers (n, K) against the deployed ones."""
    difference, n = relative(deployed, gentle), len(deployed)
    said = f"differ from the deployed ones by {difference:.2g} of the largest logit"
    return judged("surrogate", difference > limits.surrogate, said, n, {"difference": difference})


def relative(first: Tensor, second: Tensor) -> float:
    """Largest difference of two answers, relative to the largest of the first; NaN against a number is infinite."""
    first, second = first.double(), second.double()
    same = (first == second) | (first.isnan() & second.isnan())
    difference = (first - second).abs().nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0)
    size = float(first[first.isfinite()].abs().max()) if first.isfinite().any() else 0.0
    most = float(difference.max()) if difference.numel() else 0.0
    return most / size if size else (math.inf if most else 0.0)


def noise(random: Records, one: Records, many: Records, steps: int, limits: Thresholds = THRESHOLDS) -> Finding:
    """Random noise against one and against many steps along the gradient; the weaker of the two decides."""
    share, first, n = _shares(random, one)
    _, second, _ = _shares(random, many)
    if not share + first + second:
        return skipped("noise", f"neither noise nor the gradient broke any of {n} images")
    weaker = one if first <= second else many
    said = f"noise broke {percent(share)} %, one step {percent(first)} %, {steps} steps {percent(second)} %"
    warn = share - min(first, second) > limits.noise
    return judged("noise", warn, said, n, {"noise": share, "one": first, "many": second}, mcnemar(random, weaker).p)


def null(
    first: Tensor, confirmed: Tensor, group: Sequence[Outcome], most: int, limits: Thresholds = THRESHOLDS
) -> Finding:
    """How often no perturbation at all succeeds, in as many queries as each attack spent.

    Args:
        first: queries at which each clean image was first answered wrongly, 0 where never.
        confirmed: at which a wrong answer was first confirmed by averaging, 0 where never.
        most: queries after which the control gave up.
    """
    told, rates, sure, figures = [], [], [], dict[str, float | None]()
    for outcome in group:
        queries = control_queries(outcome, most)
        rates.append(float(((first > 0) & (first <= queries)).double().mean()))
        sure.append(float(((confirmed > 0) & (confirmed <= queries)).double().mean()))
        share = success_rate(outcome.records)
        figures |= {f"{outcome.name}: success": share, f"{outcome.name}: null": rates[-1]}
        figures[f"{outcome.name}: null, confirmed"] = sure[-1]
        told.append(
            f"{outcome.name} {percent(share)} %, nothing at all {percent(rates[-1])} % at first hit and "
            f"{percent(sure[-1])} % confirmed in {queries:,} queries"
        )
    return judged("null", max(rates) > limits.null, f"success: {'; '.join(told)}", len(first), figures)


def control_queries(outcome: Outcome, most: int) -> int:
    """Queries of an attacked image, the median; at least 1, at most ``most``."""
    spent = outcome.records.queries[outcome.records.clean_correct]
    return min(most, max(1, int(np.median(spent.numpy())))) if len(spent) else 1


def slope(quotients: Mapping[float, Tensor], limits: Thresholds = THRESHOLDS) -> Finding:
    """Real rise of the margin over the predicted one, (n,) by length of the step; any length that fits is enough.

    A staircase behind a straight-through surrogate rises only over larger steps, a curved function as predicted only
    over smaller ones; a gradient that is scaled or wrong fits at none.
    """
    medians = {length: float(np.median(told.double().cpu().numpy())) for length, told in quotients.items()}
    fits = any(1 / limits.slope <= median <= limits.slope for median in medians.values())
    said = ", ".join(f"{median:.3g} at a step of {length:.3g}" for length, median in medians.items())
    n = max(len(told) for told in quotients.values())
    figures = {f"{length:.3g}": median for length, median in medians.items()}
    return judged("slope", not fits, f"real rise over predicted rise, median: {said}", n, figures)


def _shares(first: Records, second: Records) -> tuple[float, float, int]:
    """Success rates of two attacks on the images that both attacked, and the number of these."""
    one, other = common([first, second])
    right = one.clean_correct & other.clean_correct
    n = int(right.sum())
    shares = [int((part.verified & right).sum()) / n if n else 0.0 for part in (one, other)]
    return shares[0], shares[1], n
