"""Table 2 and figures 3 and 4 of GCD: detectors against an attacker who knows the classifier alone (grey box).

    python -m lit_adv.experiments.gcd_detectors
    python -m lit_adv.experiments.gcd_detectors --size vgg11 --attackers DDN-U PGD-U --detectors org IS GCD sal PD MDS
    python -m lit_adv.experiments.gcd_detectors --data cifar10_jpeg --config configs/trainer/cpu_small.yaml

Trains the base network, attacks training and test images, trains a detector for each attacker (the paper's protocol)
and one on all of them, and scores clean test images and their adversarial counterparts. Beside the paper's areas under
the ROC curve stand their intervals, the areas over all attacked images, how many adversarial images are found at 1 and
5 % of false alarms (thresholds from held-out clean images of the training split), and what a detector trained on one
attacker says of the others: whoever is attacked does not know by whom. Broken off, the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_adv.archive import weights_hash
from lit_adv.datamodules.attacked import AttackedBatch, attacked_pools
from lit_adv.defenses import GuidedComplementary
from lit_adv.detectors.sensitivity import log_sensitivity
from lit_adv.experiments.gcd_scores import DETECTORS, SLOW, Bench, Scored
from lit_adv.experiments.gcd_setup import ATTACKERS, at_least, command_line
from lit_adv.experiments.page import Page, histograms, told
from lit_adv.metrics import auc, auc_interval, share_above, threshold_at
from lit_adv.response import Response

COLUMNS = ("org", "sal", "IS", "PD", "TWS", "MDS", "GCD")
PAPER: dict[str, dict[str, tuple[str, ...]]] = {
    "mnist": {
        "FGSM-U": (".65", "1.00", "1.00", ".99", "1.00", ".73", ".81", "1.00"),
        "PGD-U": (".00", "1.00", "1.00", ".89", "1.00", ".75", ".89", "1.00"),
        "PGD-T": (".00", "1.00", "1.00", ".72", "1.00", ".93", ".90", "1.00"),
        "DFool-U": (".00", "1.00", "1.00", "1.00", ".98", ".99", ".87", "1.00"),
        "CW-U": (".00", ".99", "1.00", "1.00", ".93", ".95", ".89", "1.00"),
        "CW-T": (".00", "1.00", "1.00", "1.00", ".98", ".99", ".93", "1.00"),
        "DDN-U": (".00", "1.00", "1.00", "1.00", ".98", ".80", ".89", "1.00"),
        "DDN-T": (".00", "1.00", "1.00", "1.00", "1.00", "1.00", ".95", "1.00"),
    },
    "cifar10_jpeg": {
        "FGSM-U": (".19", "1.00", "1.00", ".95", ".99", ".52", ".83", "1.00"),
        "PGD-U": (".10", "1.00", "1.00", ".86", ".99", ".52", ".76", "1.00"),
        "PGD-T": (".18", "1.00", "1.00", ".64", ".99", ".58", ".71", "1.00"),
        "DFool-U": (".00", ".50", ".50", ".98", ".77", ".83", ".93", ".98"),
        "CW-U": (".00", ".50", ".50", ".98", ".78", ".90", ".93", ".98"),
        "CW-T": (".00", ".51", ".51", ".98", ".84", ".94", ".94", ".98"),
        "DDN-U": (".00", ".50", ".50", ".99", ".70", ".91", ".93", ".99"),
        "DDN-T": (".00", ".51", ".53", ".99", ".81", ".96", ".94", ".99"),
    },
}
"""The paper's table 2: accuracy of the classifier under attack, then the areas of its seven detectors."""

GOAL = 0.98
CROSS = ("org", "IS", "GCD")


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Make what is missing, score, write tables and figures."""
    given, setup = command_line(__doc__, arguments, Path("runs/gcd_detectors"), _flags)
    density = None if given.density is None else tuple(f"--{flag}" for flag in given.density)
    bench = Bench(setup, given.folder / setup.tag, given.held, given.slow_held, density)
    table: dict[str, dict[str, Scored]] = {}
    for attacker in given.attackers:
        table[attacker] = {name: bench.scored(name, attacker) for name in given.detectors}
        print(f"{attacker}: " + ", ".join(f"{n} {auc(s.clean, s.adversarial):.3f}" for n, s in table[attacker].items()),
              flush=True)  # fmt: skip
    pages = [areas(bench, table, given), rates(bench, table)]
    if len(given.attackers) > 1:
        pages.append(matrix(bench, given))
    files = []
    for page, stem in zip(pages, ("areas", "rates", "matrix"), strict=False):
        print(page)
        files += page.write(bench.folder, stem + subset(given.attackers, given.detectors))
    files += shown(bench, given.attackers)
    print("\n".join(map(str, files)))
    return files


def subset(attackers: Sequence[str], detectors: Sequence[str] = DETECTORS) -> str:
    """What files of some attackers or detectors are called further, so that they never replace those of all."""
    words = []
    for chosen, every in ((attackers, ATTACKERS), (detectors, DETECTORS)):
        if set(chosen) != set(every):
            words += [name.replace("*", "-star") for name in every if name in chosen]
    return "".join(f"_{word.lower()}" for word in words)


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--detectors", nargs="+", default=list(DETECTORS), choices=DETECTORS, metavar="NAME")
    add("--held", type=at_least(1), default=1000, help="held-out clean images that set thresholds")
    add("--slow_held", type=at_least(1), default=200, help="the same for TWS, of up to 1,000 gradient steps an image")
    add("--cross_pairs", type=at_least(1), default=None, help="test pairs of the cross-attack matrix; default: all")
    add("--bootstrap", type=at_least(1), default=1000, help="resamples of an interval")
    add(
        "--density",
        nargs="*",
        metavar="FLAG",
        default=None,
        help="of the density's training; default: its usual ones",
    )


def areas(bench: Bench, table: dict[str, dict[str, Scored]], given: argparse.Namespace) -> Page:
    """Areas under the ROC curve over successful attacks, the paper's below ours."""
    names = list(given.detectors)
    rows, missed = [], []
    for attacker, found in table.items():
        cells = []
        for name, one in found.items():
            area = auc_interval(one.clean, one.adversarial, given.bootstrap)
            cells.append(str(area))
            if name == "GCD" and area.value < GOAL:
                missed.append(f"{attacker} {area.value:.3f}" + (" (the interval reaches it)" * (area.high >= GOAL)))
        rows.append([attacker, f"{len(next(iter(found.values())).clean)}", _accuracy(bench, attacker), *cells])
        paper = PAPER[bench.setup.data].get(attacker)
        if paper:
            shown = dict(zip(COLUMNS, paper[1:], strict=True))
            rows.append([f"{attacker} (paper)", "", paper[0], *(shown.get(name, "") for name in names)])
    tried = f"of the {len(table)} attackers tried"
    verdict = f"met for every one {tried}" if not missed else f"{tried} missed by " + ", ".join(missed)
    notes = [
        f"Goal, the paper's claim: GCD at least {GOAL} for every attacker: {verdict}." if "GCD" in names else "",
        "Area over test images whose attack succeeded and their clean counterparts, with the 95 % bootstrap interval "
        "over image pairs; where all of them are in order (area 1) no resample differs, and the lower end is the area "
        "at which so many independent pairs would all be in order with a probability of 5 %. F: accuracy of the "
        "classifier on the test images tried, under attack.",
        "Each detector was trained (org, sal, IS, GCD) or fitted (MDS, LID) on the same attacker's successes on "
        "training images; PD, TWS and InSen (the sensitivity itself) know no attack.",
        "MDS and LID count noisy images as benign, as published; with a star they are fitted to clean and adversarial "
        "images alone. Noise on the black ground of digits looks odder to them than an attack does.",
        "The paper's networks are VGG-11 throughout; its constants for TWS on MNIST, its density's size and its "
        "attacks' settings are not told.",
        f"PD's density: weights {weights_hash(bench.setup.density(bench.density))[:8]}." if "PD" in names else "",
        *(told(bench.setup.protocol(name)) + f", targets: {ATTACKERS[name].target}" for name in table),
    ]
    heads = ["attacker", "pairs", "F", *names]
    return Page("Detectors in the grey box (table 2)", _settings(bench), heads, rows, [note for note in notes if note])


def _accuracy(bench: Bench, attacker: str) -> str:
    """Of the classifier on the test images tried up to the last pair that counts."""
    last = int(bench.setup.test(attacker).index[-1])
    _, columns = attacked_pools(bench.setup.attacked(attacker, "test")).read()
    attacked = int((columns["index"] == last).nonzero()[0]) + 1  # right at first; some may not have moved at all
    x, label = columns["x_adv"][:attacked], columns["label"][:attacked]
    with torch.no_grad():
        classes = torch.cat([bench.setup.base(part).argmax(-1) for part in torch.split(x, 128)])
    data = bench.setup.images()
    data.prepare_data()
    tried = int((data.dataset("test").index == last).nonzero()[0]) + 1
    return f"{int((classes == label).sum()) / tried:.2f}"


def rates(bench: Bench, table: dict[str, dict[str, Scored]]) -> Page:
    """What a detector finds at a rate of false alarms, and how many false alarms it then really gives."""
    rows = []
    for attacker, found in table.items():
        for name, one in found.items():
            every = torch.cat([one.adversarial, one.failed])
            cells = [attacker, name, f"{auc(one.clean, every):.3f} ({len(every)})"]
            if one.own == one.own:
                cells += [_pair(one, one.own)]
            else:
                cells += [""]
            for share in (0.01, 0.05):
                few = share * len(one.held) < 1
                cells += ["" if few else _pair(one, threshold_at(one.held, share))]
            rows.append(cells)
    heads = ["attacker", "detector", "area over all attacked (images)", "own threshold: found / false alarms, %",
             "1 %: found / false alarms, %", "5 %: found / false alarms, %"]  # fmt: skip
    notes = [
        "Thresholds of 1 and 5 %: quantiles of held-out clean images of the training split; false alarms are then "
        "counted on the clean test images of the pairs, which the classifier gets right. Blank: the rate is less than "
        "one of the held-out images.",
        "All attacked: all test images right at first up to the last pair, also those that the attack did not move.",
        "Found: share of successful adversarial images above the threshold.",
    ]
    return Page("Detection and false alarms in the grey box", _settings(bench), heads, rows, notes)


def _pair(one: Scored, threshold: float) -> str:
    return f"{100 * share_above(one.adversarial, threshold):.1f} / {100 * share_above(one.clean, threshold):.1f}"


def matrix(bench: Bench, given: argparse.Namespace) -> Page:
    """Detectors trained on one attacker, or on all, tested on every attacker."""
    setup, attackers = bench.setup, list(given.attackers)
    tests = {name: setup.test(name) for name in attackers}
    rows = []
    for names in [[name] for name in attackers] + [attackers]:
        defence = setup.defence(names)
        margins = {name: _margins(bench, defence, tests[name], given.cross_pairs) for name in attackers}
        for detector in CROSS:
            if detector not in given.detectors:
                continue
            column = {"org": 1, "IS": 2, "GCD": 0}[detector]
            cells = [f"{auc(clean[column], adv[column]):.3f}" for clean, adv in margins.values()]
            alone = len(names) == 1
            rows.append([detector, names[0] if alone else "all, pooled", *cells,
                         f"{min(float(cell) for cell in cells):.3f}" if alone else ""])  # fmt: skip
    rows.sort(key=lambda row: CROSS.index(row[0]))
    heads = ["detector", "trained on", *attackers, "worst"]
    notes = [
        "Area under the ROC curve over successful attacks. The paper shows the diagonal alone; whoever deploys a "
        "detector does not know the attacker, so that the column 'worst' is what it is worth.",
        f"The pooled detectors have learnt from {setup.train_pairs} pairs of each of these attackers, "
        f"{len(attackers) * setup.train_pairs} in all, the others from {setup.train_pairs}; no attacker here is "
        "unknown to them, so that they have no 'worst'.",
    ]
    return Page("Detectors against every attacker", _settings(bench), heads, rows, notes)


def _margins(
    bench: Bench, defence: GuidedComplementary, pairs: AttackedBatch, most: int | None
) -> tuple[Tensor, Tensor]:
    """Margins of the ensemble and of both its members, (3, n), of clean and of adversarial images."""
    found = []
    for images in (pairs.image[:most], pairs.x_adv[:most]):
        parts = []
        for x in torch.split(images, 128):
            with torch.no_grad():
                told_of = defence.judgement(x)
            parts.append(torch.stack([told_of.margin, told_of.image, told_of.sensitivity]).double())
        found.append(torch.cat(parts, 1))
    return found[0], found[1]


def shown(bench: Bench, attackers: Sequence[str]) -> list[Path]:
    """Histograms of the input sensitivity (figures 3 and 4), as a picture and for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    values: dict[str, Tensor] = {}
    for attacker in attackers:
        ok, _ = bench.pairs(attacker)
        values.setdefault("clean", _logs(bench, ok.image))
        values[attacker] = _logs(bench, ok.x_adv)
    with SummaryWriter(str(bench.folder / "tensorboard")) as writer:
        for name, found in values.items():
            writer.add_histogram(f"log10_sensitivity/{name}", found)
    files = []
    for family, number in (("l2", 3), ("linf", 4)):
        chosen = {name: v for name, v in values.items() if name == "clean" or ATTACKERS[name].family == family}
        if len(chosen) > 1:
            title = f"input sensitivity under {family} attacks (the paper's figure {number}: no figures in its text)"
            path = bench.folder / f"sensitivity_{family}{subset(attackers)}.png"
            files.append(histograms(path, {n: v.tolist() for n, v in chosen.items()}, "log10 S(x)", title))
    return files


def _logs(bench: Bench, x: Tensor) -> Tensor:
    return torch.cat([log_sensitivity(Response(bench.setup.base, part)) for part in torch.split(x, 128)]).cpu()


def _settings(bench: Bench) -> dict[str, object]:
    setup = bench.setup
    return {
        "data": setup.data, "size": setup.size, "base": f"{setup.base_path.name} (weights "
        f"{weights_hash(setup.base)[:8]})", "training pairs": setup.train_pairs, "test pairs": setup.test_pairs,
        "detectors' epochs": setup.epochs or "as configured", "held-out images": bench.held,
        f"of these for {', '.join(SLOW)}": bench.slow,
    }  # fmt: skip


if __name__ == "__main__":
    main()
