"""What the white-box experiment on GCD shows: the paper's tables 3 and 4 beside ours, worst cases, and curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from lit_adv.experiments.page import Curve, Page, figure, told
from lit_adv.metrics import Records
from lit_adv.metrics.summary import wilson
from lit_adv.protocol import Protocol
from lit_adv.tables import interval, percent

DIRECT, FROM_IMAGE, TRANSFER, BLACK = "direct", "from_image", "transfer", "black_box"
MODELS = ("NoDET", "DET_IS", "GCD")
PAPER: dict[str, dict[str, tuple[str, str, str]]] = {
    "mnist": {
        "FGSM-U": ("27.1", "1.2", "0.0"),
        "PGD-U": ("100.0", "87.1", "26.3"),
        "PGD-T": ("100.0", "100.0", "43.7"),
        "DFool-U": ("100.0", "82.8", "28.6"),
        "CW-U": ("100.0", "0.0", "0.8"),
        "CW-T": ("100.0", "18.0", "47.1"),
        "DDN-U": ("100.0", "0.4", "94.1"),
        "DDN-T": ("100.0", "80.8", "39.2"),
    },
    "cifar10_jpeg": {
        "FGSM-U": ("31.5", "0.9", "0.0"),
        "PGD-U": ("94.5", "80.5", "14.3"),
        "PGD-T": ("95.7", "73.4", "46.3"),
        "DFool-U": ("100.0", "73.8", "39.4"),
        "CW-U": ("100.0", "0.9", "2.3"),
        "CW-T": ("100.0", "55.6", "32.1"),
        "DDN-U": ("100.0", "1.9", "1.4"),
        "DDN-T": ("100.0", "100.0", "100.0"),
    },
}
"""The paper's table 3: success in per cent against NoDET, DET_IS and GCD."""
PAPER_L2: dict[str, dict[tuple[str, str], str]] = {
    "mnist": {("DDN-U", "NoDET"): "0.787", ("DDN-U", "GCD"): "10.252"},
    "cifar10_jpeg": {("DDN-T", "NoDET"): "0.45", ("DDN-T", "GCD"): "0.618"},
}
"""The paper's table 4: mean l2 of the perturbation."""

TABLE_HEADS = (
    "detectors", "attack", "images", "NoDET", "paper: NoDET", "DET_IS direct", "DET_IS eq. 14", "DET_IS every way",
    "paper: DET_IS", "GCD direct", "GCD eq. 14", "GCD every way", "95 % interval", "paper: GCD",
    "refused when clean: DET_IS, GCD",
)  # fmt: skip
LINE_HEADS = (
    "detectors", "of", "network", "attack", "form", "images", "success, %", "95 % interval", "successes", "mean L2",
    "median L2", "paper: mean L2", "mean linf", "gradients or queries per image",
)  # fmt: skip
FEW = 10
"""Of fewer successes the mean distance is not set beside the paper's."""
RADII = (1.0, 2.0, inf)
"""In l2, at which the worst case is taken."""
ROBUST = (
    "Not broken: of all test images, right and not refused when clean and broken by no attack of the row. A clean "
    "image that is refused counts as an error, an adversarial one that is refused as a win for the defender. An image "
    "is broken within a radius where any attack, whatever its norm, found an adversarial image that near. Blank: no "
    "attack of this norm was tried on this network.",
    "An upper bound of robust accuracy. pooled: the ways of all attackers were tried, these rows tell most. own: the "
    "ways of one attacker alone, that of the column 'of' (and a few further ones, see table 3): what others would "
    "break is not known, and no such figure is a robust accuracy.",
    "Images that the audit's own attacks broke count as broken, too; it probed GCD alone, and only the first images.",
    "Attacks by queries saw the first images alone; attacks of a fixed radius stop at their first success, so what "
    "they found may lie farther in l2 than need be.",
)
"""Notes below what the attacks left."""


@dataclass(frozen=True, eq=False)
class Result:
    """What one way of attacking achieved on one network.

    Attributes:
        detectors: own or pooled; "" without. group: whose. model: NoDET, DET_IS or GCD. attacker, form: as told.
        records: of all test images; those wrong or refused when clean were not attacked. alarms: of those that are
            refused when clean though the classifier is right, attacked apart.
        right: (n,) whether the classifier is right. refused: (n,) whether the clean image is refused.
        norm, eps: of the threat model.
    """

    detectors: str
    group: str
    model: str
    attacker: str
    form: str
    records: Records
    alarms: Records
    right: Tensor
    refused: Tensor
    norm: str = "l2"
    eps: float = inf

    @property
    def counted(self) -> Records:
        """The paper's denominator: all images that the classifier is right about."""
        return Records.cat([self.records[self.records.clean_correct], self.alarms]).unique()


def rate(results: Sequence[Result]) -> tuple[int, int]:
    """Images that any of the ways broke, and images that count: successes and their number."""
    broken: set[int] = set()
    counted: set[int] = set()
    for result in results:
        found = result.counted
        counted |= set(found.index.tolist())
        broken |= set(found.index[found.verified].tolist())
    return len(broken), len(counted)


def table_page(results: Sequence[Result], facts: Mapping[str, object], notes: Sequence[str], data: str) -> Page:
    """The paper's table 3, ours beside it.

    Args:
        notes: what the audit says. data: whose figures of the paper are shown.
    """
    rows = []
    for detectors in dict.fromkeys(result.detectors for result in results if result.detectors):
        block = [result for result in results if result.detectors in ("", detectors)]
        own = [result for result in block if result.detectors]
        for attacker in dict.fromkeys(result.attacker for result in own):
            ways = [result for result in block if result.attacker == attacker]
            apart = dict.fromkeys(r.form for r in ways) if attacker not in PAPER["mnist"] else {"": None}
            for form in apart:
                chosen = [result for result in ways if not form or result.form == form]
                rows.append(_table_row(detectors, attacker, form, chosen, PAPER[data].get(attacker, ("", "", ""))))
    fixed = (
        "Success in per cent: fooled (targeted: the target) and not refused, verified by a second pass; of all images "
        "that the classifier is right about, those refused when clean included, which are attacked as the others.",
        "'eq. 14': the best of the weights beta on these very images, which stands beside it (all that are equal); for "
        "targeted attackers it is ours, the paper has it for untargeted ones alone. 'lower edge', 'upper edge': the "
        "least or the largest weight tried is among the best, so one beyond might do better. For C&W beta 1 is the "
        "direct attack up to kappa. 'every way' counts an image that any way of "
        "this attacker broke: direct, eq. 14, from the image itself instead of a random point (PGD), and other forms "
        "of the refusal's column (targeted; product2 refuses from margin -1/2 on, so its successes count).",
        "own: detectors trained on the same attacker's grey-box images, as in the paper (transfer meets those of CW-U, "
        "NAttack and Square those of PGD-U, HopSkipJump those of DDN-U). pooled: one pair trained on all eight.",
        "Paper: Li et al. 2020, table 3, VGG-11, attack settings not told. Untargeted figures of the paper are of "
        "eq. (14), with a weight that is not told.",
    )
    return Page("White-box attacks on GCD (table 3)", facts, TABLE_HEADS, rows, [*fixed, *notes])


def _table_row(
    detectors: str, attacker: str, form: str, ways: Sequence[Result], paper: tuple[str, str, str]
) -> list[str]:
    of = {model: [result for result in ways if result.model == model] for model in MODELS}
    plain = (DIRECT, form)
    broken, images = rate(of["GCD"])
    alarms = []
    for model in ("DET_IS", "GCD"):
        alarms += [percent(result.refused.double().mean().item()) for result in of[model][:1]]
    return [
        detectors, f"{attacker} ({form})" if form and form != BLACK else attacker, f"{images}",
        _share([r for r in of["NoDET"] if r.form in plain]), paper[0],
        _share([r for r in of["DET_IS"] if r.form in plain]), _best(of["DET_IS"]), _share(of["DET_IS"]), paper[1],
        _share([r for r in of["GCD"] if r.form in plain]), _best(of["GCD"]), _share(of["GCD"]),
        interval(wilson(broken, images)), paper[2], ", ".join(alarms),
    ]  # fmt: skip


def _share(results: Sequence[Result]) -> str:
    broken, images = rate(results)
    return percent(broken / images) if images else ""


def _best(results: Iterable[Result]) -> str:
    """The highest success over the weights of equation (14), the weights that reach it, and whether one is an edge."""
    found = {float(r.form.split()[1]): rate([r]) for r in results if r.form.startswith("beta")}
    if not found or not any(images for _, images in found.values()):
        return ""
    most = max(broken for broken, _ in found.values())
    share = percent(most / next(images for broken, images in found.values() if broken == most))
    best = [beta for beta, (broken, _) in found.items() if broken == most]
    if len(best) == len(found) > 1:
        return f"{share} (every beta)"
    edges = [name for name, beta in (("lower edge", min(found)), ("upper edge", max(found))) if beta in best]
    told = [f"beta {', '.join(f'{beta:g}' for beta in best)}", *(edges if len(found) > 1 else [])]
    return f"{share} ({', '.join(told)})"


def lines_page(
    results: Sequence[Result], facts: Mapping[str, object], protocols: Sequence[Protocol], data: str
) -> Page:
    """Every way by itself, with the distances of its successes (table 4) and what it costs."""
    rows = []
    for result in results:
        found = result.counted
        broken = found[found.verified]
        paper = PAPER_L2[data].get((result.attacker, result.model), "")
        of_paper = result.form == DIRECT if result.model == "NoDET" else result.form.startswith("beta")
        if not result.attacker.endswith("-U"):
            of_paper = result.form == DIRECT
        of_paper = of_paper and len(broken) >= FEW
        rows.append([
            result.detectors, result.group, result.model, result.attacker, result.form, f"{len(found)}",
            percent(len(broken) / len(found)) if len(found) else "", interval(wilson(len(broken), len(found))),
            f"{len(broken)}", _mean(broken.l2, 3), f"{broken.l2.quantile(0.5):.3f}" if len(broken) else "",
            paper if of_paper else "", _mean(broken.linf, 3), _mean(found.queries, 0),
        ])  # fmt: skip
    notes = [
        "Distances are those of successes, so they are of other images in each line: read them with the success rate.",
        f"Paper: Li et al. 2020, table 4 (mean, over which images is not told); beside {FEW} successes or more.",
        "Direct attacks, transferred images and black boxes with all their arguments below. 'beta': the same with the "
        "loss of equation (14) (C&W: beta, and kappa 0.01); 'from the image': random_start false; product, product2: "
        "the direct attack on another form of the refusal's column.",
        *map(told, protocols),
    ]
    return Page("White-box attacks on GCD, way by way (table 4)", facts, LINE_HEADS, rows, notes)


def robust_page(
    results: Sequence[Result],
    facts: Mapping[str, object],
    eps: float,
    probes: Mapping[tuple[str, str, str], Sequence[Records]] | None = None,
) -> Page:
    """What all that was tried on a network left of it, image by image.

    Args:
        probes: records of the audit's own attacks, by detectors, group and name of the network.
    """
    limits = [("linf", eps), *(("l2", radius) for radius in RADII)]
    heads = [
        "detectors", "of", "network", "ways", "images", "right and not refused when clean, %", "refused when clean, %",
        "images probed by the audit",
        *(f"{norm.replace('l2', 'L2')} {radius:.3g}: not broken by these ways, %" for norm, radius in limits),
    ]  # fmt: skip
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in sorted(results, key=lambda each: ("", "pooled", "own").index(each.detectors)):
        groups.setdefault((result.detectors, result.group, result.model), []).append(result)
    rows = []
    for key, ways in groups.items():
        first = max(ways, key=lambda way: len(way.records))
        n = len(first.right)
        clean = int((first.right & ~first.refused).sum())
        own = (probes or {}).get(key, [])
        cells = []
        for norm, radius in limits:
            left = clean - len(_broken([*(way.records for way in ways), *own], norm, radius))
            tried = any(way.norm == norm for way in ways)
            cells.append(f"{percent(left / n)} {interval(wilson(left, n))}" if tried else "")
        alarms = percent(first.refused.double().mean().item())
        seen = {index for records in own for index in records.index.tolist()}
        rows.append([*key, f"{len(ways)}", f"{n}", percent(clean / n), alarms, f"{len(seen) or ''}", *cells])
    return Page("What the attacks left, image by image (white box, transfer, black box)", facts, heads, rows, ROBUST)


def _broken(tried: Iterable[Records], norm: str, radius: float) -> set[int]:
    """Images broken within a radius, of those right and not refused when clean."""
    found: set[int] = set()
    for every in tried:
        records = every[every.clean_correct & every.verified]
        far = records.linf if norm == "linf" else records.l2
        found |= set(records.index[far <= radius * (1 + 1e-6) + 1e-7].tolist())
    return found


def curves(results: Sequence[Result], folder: Path) -> list[Path]:
    """Success against the distance that is allowed in l2, for attackers of the nearest image; the figures' files."""
    files = []
    for detectors in dict.fromkeys(result.detectors for result in results if result.detectors):
        block = [r for r in results if r.detectors in ("", detectors) and r.norm == "l2" and r.eps == inf]
        names = dict.fromkeys(r.attacker for r in block if r.attacker in PAPER["mnist"])
        for attacker in names:
            ways = [result for result in block if result.attacker == attacker]
            drawn = [(model, [r for r in ways if r.model == model and r.form == DIRECT]) for model in MODELS]
            drawn.append(("GCD, eq. 14", [r for r in ways if r.model == "GCD" and r.form.startswith("beta")]))
            points = [(name, nearest(chosen)) for name, chosen in drawn if chosen]
            far = max((float(near[near.isfinite()].max()) for _, near in points if near.isfinite().any()), default=1.0)
            grid = torch.linspace(0, 1.05 * far, 60, dtype=torch.float64)
            lines = [Curve(name, grid.tolist(), _reached(near, grid)) for name, near in points]
            path = folder / f"{attacker.lower()}_{detectors}.png"
            title = f"{attacker}, detectors: {detectors}"
            files.append(figure(path, lines, "allowed distance (L2)", "success, %", title))
    return files


def nearest(ways: Sequence[Result]) -> Tensor:
    """Of each image that counts the l2 distance of the nearest success over all ways, inf where there is none."""
    found: dict[int, float] = {}
    for way in ways:
        records = way.counted
        far = torch.where(records.verified, records.l2, inf)
        for index, distance in zip(records.index.tolist(), far.tolist(), strict=True):
            found[index] = min(distance, found.get(index, inf))
    return torch.tensor([found[index] for index in sorted(found)], dtype=torch.float64)


def _reached(near: Tensor, grid: Tensor) -> list[float]:
    return [100 * float((near <= limit + 1e-9).double().mean()) if len(near) else 0.0 for limit in grid]


def _mean(values: Tensor, digits: int) -> str:
    return f"{values.double().mean():,.{digits}f}" if len(values) else ""
