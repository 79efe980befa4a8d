"""Table 5 and figure 6 of GCD: how many adversarial images a rectifier brings back to their true class.

    python -m lit_adv.experiments.gcd_rectifier

The attackers know the classifier f alone (grey box). For each of them, detectors and a rectifier f_rec learn from its
training images (the paper's protocol), and further ones from those of all attackers together (pooled), which is what
can be deployed against an attacker unknown. Beside them stand f on suppressed images, PixelDefend, total variation
minimisation and two adversarially trained networks: on the same images, which were made for f, and attacked themselves.
The second page says what detectors contribute and what remains over clean and adversarial images together; figure 6
shows the accuracy against alpha. What every image was answered is kept; broken off, the same command goes on.

The paper's figures: Li et al. 2020, table 5.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lit_adv.archive import weights_hash
from lit_adv.evaluation import evaluate
from lit_adv.experiments.gcd_rectified import ALPHA_TARGETED, JUDGED, Bench, Images, attacked_images, clean_images
from lit_adv.experiments.gcd_setup import ALPHA, ATTACKERS, at_least, command_line, share
from lit_adv.experiments.page import Curve, Page, figure, told
from lit_adv.metrics.summary import wilson
from lit_adv.suppression import MaskMode
from lit_adv.tables import interval, percent

BASELINES = {"pd": "PixelDefend + f", "tvm": "TVM + f", "pgd_at": "PGD-AT", "ddn_at": "DDN-AT"}
ITSELF = ("pgd_at", "ddn_at")
PAPER_HEADS = ("Our", "PD", "DDN", "PGD", "TVM", "F")
PAPER: dict[str, dict[str, tuple[str, ...]]] = {
    "mnist": {
        "clean": (".91", ".90", ".86", ".84", ".67", ".92"),
        "FGSM-U": (".85", ".75", ".82", ".82", ".49", ".56"),
        "PGD-U": (".84", ".64", ".80", ".81", ".57", ".27"),
        "PGD-T": (".89", ".86", ".84", ".87", ".53", ".66"),
        "DFool-U": (".90", ".88", ".26", ".76", ".65", ".00"),
        "CW-U": (".90", ".88", ".70", ".73", ".66", ".00"),
        "CW-T": (".89", ".86", ".72", ".53", ".65", ".00"),
        "DDN-U": (".90", ".89", ".74", ".76", ".66", ".00"),
        "DDN-T": (".90", ".89", ".59", ".64", ".65", ".00"),
    },
    "cifar10_jpeg": {
        "clean": (".82", ".79", ".75", ".64", ".35", ".86"),
        "FGSM-U": (".64", ".36", ".55", ".43", ".29", ".24"),
        "PGD-U": (".77", ".30", ".37", ".35", ".32", ".08"),
        "PGD-T": (".74", ".62", ".33", ".48", ".32", ".05"),
        "DFool-U": (".74", ".71", ".19", ".29", ".34", ".00"),
        "CW-U": (".75", ".73", ".70", ".63", ".34", ".00"),
        "CW-T": (".74", ".75", ".45", ".46", ".33", ".00"),
        "DDN-U": (".75", ".74", ".66", ".52", ".34", ".00"),
        "DDN-T": (".75", ".75", ".53", ".43", ".34", ".00"),
    },
}
"""The paper's table 5: accuracy, by attacker, of its columns."""

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MODES: tuple[MaskMode, ...] = ("threshold", "quantile")
FINDING = "the paper (ImageNet, no figures in its text): an interior maximum, 0.45 untargeted, 0.35 targeted"


@dataclass(frozen=True)
class Line:
    """One rectifying defence against one attacker.

    Args:
        attacker: its name. who: "own" or "pooled": what detectors and rectifier learnt from. alpha: of equation (12).
        images: attacked test images. judged: of them, (n, 5). clean, passed: clean test images and what the same
            defence makes of them, (m, 2).
    """

    attacker: str
    who: str
    alpha: float
    images: Images
    judged: Tensor
    clean: Images
    passed: Tensor

    def right(self, column: str) -> Tensor:
        """Which attacked images are classified rightly by a column of ``JUDGED``."""
        return self.judged[:, JUDGED.index(column)] == self.images.label

    @property
    def flagged(self) -> Tensor:
        """Which attacked images the detectors find."""
        return self.judged[:, JUDGED.index("flagged")] == 1

    @property
    def clean_right(self) -> Tensor:
        """Which clean images come out rightly."""
        return self.passed[:, 0] == self.clean.label


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Train what is missing, ask what is missing, write tables and figures."""
    given, setup = command_line(__doc__, arguments, Path("runs/gcd_rectifier"), _flags)
    bench = Bench(setup, given.folder / setup.tag, given.rectifier_epochs, given.averages, given.mode, given.share)
    clean = clean_images(setup, given.clean)
    attacked = {name: attacked_images(setup, name) for name in given.attackers}
    lines = [line for name in given.attackers for line in lines_of(bench, [name], "own", attacked[name], clean)]
    if given.pooled:
        for name in given.attackers:
            lines += lines_of(bench, given.attackers, "pooled", attacked[name], clean)
    others: dict[str, dict[str, Tensor]] = {}
    models = {"f": bench.setup.base} | {name: bench.baseline(name) for name in given.columns}
    for column, model in models.items():
        if model is not None:
            print(f"{column}: {len(attacked)} attackers and {len(clean.label)} clean images", flush=True)
            others[column] = {
                seen.name: bench.decisions(model, seen) == seen.label for seen in (clean, *attacked.values())
            }
    tried = {name: model for name in ITSELF if (model := models.get(name)) is not None and given.own}
    owns = {name: own(bench, name, model, given) for name, model in tried.items()}
    notes = _notes(bench, models, given)
    pages = [(table(lines, others, owns, setup.data, notes, _settings(bench, given)), "rectifier"),
             (end_to_end(lines, owns, _settings(bench, given)), "end_to_end")]  # fmt: skip
    files = []
    if given.sweep:
        page, pictures = sweep(bench, attacked, given)
        pages.append((page, "alpha"))
        files += pictures
    for page, stem in pages:
        print(page)
        files += page.write(bench.folder, stem)
    print("\n".join(map(str, files)))
    return files


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--clean", type=at_least(1), default=1000, help="clean test images, from the first on")
    add(
        "--columns",
        nargs="*",
        default=list(BASELINES),
        choices=list(BASELINES),
        metavar="NAME",
        help="of other defences",
    )
    add("--pooled", action=argparse.BooleanOptionalAction, default=True, help="also detectors that learnt from all")
    add("--own", type=at_least(0), default=50, help="images of attacks on the adversarially trained networks; 0: none")
    add("--rectifier_epochs", type=at_least(1), default=None, help="of fine-tuning; default: as configured")
    add("--averages", type=at_least(1), default=1, help="draws of a rectified image whose probabilities are averaged")
    add("--mode", choices=MODES, default="threshold", help="how suspects are chosen; equation (12): threshold")
    add("--share", type=share, default=0.5, help="probability with which a suspect is replaced")
    add("--sweep", action=argparse.BooleanOptionalAction, default=True, help="figure 6")


def lines_of(bench: Bench, learnt: Sequence[str], who: str, images: Images, clean: Images) -> list[Line]:
    """The defence that learnt from some attackers against one, at the paper's one or two values of alpha.

    The pooled one has the value against untargeted attacks alone.
    """
    lines = []
    for alpha in bench.alphas(images.name)[: None if who == "own" else 1]:
        defence = bench.rectified(learnt, alpha)
        print(f"{images.name}: {who} detectors and rectifier, alpha {alpha}", flush=True)
        judged = bench.judged(defence, images)
        lines.append(Line(images.name, who, alpha, images, judged, clean, bench.passed(defence, clean)))
    return lines


class Own(NamedTuple):
    """Attacks made on a network itself.

    Attributes:
        accuracy: over the images that the network gets right. moved: median L2 of the successes. images: attacked.
    """

    accuracy: float
    moved: float
    images: int


Owns = dict[str, dict[str, Own]]
"""By network and attacker."""


def own(bench: Bench, name: str, model: nn.Module, given: argparse.Namespace) -> dict[str, Own]:
    """What becomes of an adversarially trained network attacked itself; records of earlier runs are read."""
    protocols = [bench.setup.protocol(attacker) for attacker in given.attackers]
    report = evaluate(
        model, bench.setup.images(), protocols, dirpath=bench.folder / f"own_{name}", max_samples=given.own,
        name=BASELINES[name], audit=False, progress=True,
    )  # fmt: skip
    found = {}
    for outcome in report.outcomes:
        attacked = outcome.records[outcome.records.clean_correct]
        broken = attacked[attacked.verified]
        moved = float(broken.l2.median()) if len(broken) else float("nan")
        found[outcome.name] = Own(1 - len(broken) / max(1, len(attacked)), moved, len(attacked))
    return found


def table(
    lines: Sequence[Line],
    others: dict[str, dict[str, Tensor]],
    owns: Owns,
    data: str,
    notes: Sequence[str],
    settings: dict[str, object],
) -> Page:
    """Table 5: accuracy in per cent over all images attacked, and on clean images."""
    pooled = {line.attacker: line for line in lines if line.who == "pooled"}
    columns = {name: found for name, found in others.items() if name != "f"}
    heads = ["attacker", "alpha", "images", "ours, pipeline", "ours, oracle", "ours without fine-tuning, oracle"]
    heads += ["pooled, pipeline", "pooled, oracle"] if pooled else []
    for name in columns:
        heads += [BASELINES[name] + (", same images" if name in ITSELF else "")]
        heads += [f"{BASELINES[name]}, attacked itself"] if name in owns else []
    heads += ["F", *(f"paper: {head}" for head in PAPER_HEADS)]
    rows = [_clean_row(lines, columns, owns, others["f"], data, bool(pooled))]
    for line in lines:
        if line.who != "own":
            continue
        name = line.attacker
        again = any(other is not line and other.attacker == name and other.who == "own" for other in lines)
        first = line.alpha == min(other.alpha for other in lines if other.attacker == name and other.who == "own")
        row = [name, f"{line.alpha:.2f}", f"{len(line.images.label)}"]
        row += [_mean(line.right(column)) for column in JUDGED[:3]]
        rest = [_mean(pooled[name].right(column)) for column in JUDGED[:2]] if pooled else []
        for column, found in columns.items():
            rest += [_mean(found[name])]
            itself = percent(owns[column][name].accuracy) if column in owns else ""
            rest += [f"({itself})" if ATTACKERS[name].family == "l2" else itself] if column in owns else []
        rest += [_mean(others["f"][name]), *_papers(data, name)]
        rows.append(row + (rest if first or not again else [""] * len(rest)))
    return Page("GCD: rectification (table 5), accuracy in per cent", settings, heads, rows, notes)


def _clean_row(
    lines: Sequence[Line],
    columns: dict[str, dict[str, Tensor]],
    owns: Owns,
    f: dict[str, Tensor],
    data: str,
    pooled: bool,
) -> list[str]:
    """Clean images: for ours the mean over the attackers' defences, whose range stands on the second page."""

    def through(who: str) -> str:
        chosen = [line for line in lines if line.who == who and line.alpha == ALPHA[data]]
        return percent(sum(float(line.clean_right.double().mean()) for line in chosen) / len(chosen))

    row = ["clean", f"{ALPHA[data]:.2f}", f"{len(f['clean'])}", through("own"), "", ""]
    row += [through("pooled"), ""] if pooled else []
    for column, found in columns.items():
        row += [_mean(found["clean"])] + [""] * (column in owns)
    return [*row, _mean(f["clean"]), *_papers(data, "clean")]


def end_to_end(lines: Sequence[Line], owns: Owns, settings: dict[str, object]) -> Page:
    """What detection contributes, and accuracy over clean and adversarial images half and half."""
    heads = [
        "attacker", "learnt from", "alpha", "found", "false alarms", "suspects, % of values", "clean, pipeline",
        "attacked, pipeline", "95 % interval", "half and half", "successes", "of these: pipeline", "oracle",
        "95 % interval of the oracle", "without fine-tuning",
        *(f"{BASELINES[name]}: median L2 to break it" for name in owns),
    ]  # fmt: skip
    rows = []
    for line in lines:
        broken, pipeline = line.images.success, line.right("pipeline")
        clean, attacked = line.clean_right.double().mean(), pipeline.double().mean()
        masked = line.judged[:, JUDGED.index("suspects")].double() / line.images.x[0].numel()
        oracle = line.right("oracle")[broken]
        rows.append([
            line.attacker, "all, pooled" if line.who == "pooled" else "this attacker", f"{line.alpha:.2f}",
            _mean(line.flagged[broken]), _mean(line.passed[:, 1]), f"{100 * masked.mean():.1f}", percent(float(clean)),
            percent(float(attacked)), interval(wilson(int(pipeline.sum()), len(pipeline))),
            percent(float(clean + attacked) / 2), f"{int(broken.sum())}", _mean(pipeline[broken]), _mean(oracle),
            interval(wilson(int(oracle.sum()), len(oracle))), _mean(line.right("without fine-tuning")[broken]),
            *(f"{one[line.attacker].moved:.2f}" if ATTACKERS[line.attacker].family == "l2" else ""
              for one in owns.values()),
        ])  # fmt: skip
    notes = [
        "found: adversarial images that fooled f and that the detectors flag; false alarms: clean images flagged, then "
        "rectified. half and half: mean of the accuracy on clean and on attacked images.",
        "of these: of the images whose attack on f succeeded; there f itself is never right.",
    ]
    if owns:
        notes.append(
            "median L2 to break it: of the successes of the same attack made on the network itself. An L2 attack "
            "without a radius breaks every network; how far it must go tells them apart. Blank for attackers of a "
            "fixed radius, who use all of it."
        )
    return Page("GCD: rectification, end to end, in per cent", settings, heads, rows, notes)


def sweep(bench: Bench, attacked: dict[str, Images], given: argparse.Namespace) -> tuple[Page, list[Path]]:
    """Figure 6: accuracy against alpha, every adversarial image rectified."""
    curves: dict[tuple[str, str], list[Curve]] = {}
    rows = []
    for attacker, images in attacked.items():
        trained_at = bench.alphas(attacker)[-1]
        defence = bench.rectified([attacker], trained_at)
        found = bench.swept(defence, images, ALPHAS, MODES)[images.success]
        right = 100 * (found == images.label[images.success][:, None, None, None]).double().mean(0)
        for m, mode in enumerate(MODES):
            for n, network in enumerate(("f_rec", "f")):
                values = right[m, :, n].tolist()
                curves.setdefault((mode, network), []).append(Curve(attacker, ALPHAS, values))
                rows.append([attacker, mode, network, f"{trained_at:.2f}, {bench.mode}" if network == "f_rec" else "",
                             *(f"{value:.1f}" for value in values), best_alphas(values, len(found))])  # fmt: skip
    heads = ["attacker", "mode", "network", "fine-tuned at alpha", *(f"{alpha}" for alpha in ALPHAS),
             "best alpha, on these images"]  # fmt: skip
    notes = [
        f"Accuracy in per cent over the successes on f, all of them rectified, at each alpha; {FINDING}.",
        "threshold: equation (12) as printed, where a larger alpha suspects fewer values; quantile: the share alpha of "
        "largest sensitivity. f_rec was fine-tuned at one alpha and is asked at all; f is the classifier as it is.",
        "The same random numbers at every alpha. Best alpha: all within one image of the best; - where all are equal; "
        "chosen on the very images that are shown.",
    ]
    page = Page("GCD: accuracy against alpha (figure 6)", _settings(bench, given), heads, rows, notes)
    names = {"f_rec": "the rectifier f_rec", "f": "f without fine-tuning"}
    pictures = [
        figure(bench.folder / f"alpha_{mode}_{network}.png", drawn, f"alpha, mode {mode}", "rectified accuracy, %",
               f"{names[network]}; {FINDING.partition(':')[0]}:\n{FINDING.partition(': ')[2]}")
        for (mode, network), drawn in curves.items()
    ]  # fmt: skip
    return page, pictures


def best_alphas(values: Sequence[float], images: int) -> str:
    """The alphas within one image of the best, in ranges, and whether an end is among them.

    Args:
        values: accuracy at each of ``ALPHAS``, in per cent. images: that it was measured on.
    """
    if len(set(values)) == 1:
        return "-"
    best = [n for n, value in enumerate(values) if value >= max(values) - 100 / images - 1e-6]
    starts = [n for n in best if n - 1 not in best]
    ends = [n for n in best if n + 1 not in best]
    ranges = [f"{ALPHAS[a]}" if a == b else f"{ALPHAS[a]}-{ALPHAS[b]}" for a, b in zip(starts, ends, strict=True)]
    return f"{', '.join(ranges)}: " + ("at the end" if {0, len(ALPHAS) - 1} & {*best} else "inside")


def _notes(bench: Bench, models: dict[str, nn.Module | None], given: argparse.Namespace) -> list[str]:
    setup = bench.setup
    lacking = [BASELINES[name] for name, model in models.items() if model is None]
    hashes = ", ".join(f"{BASELINES[name]} {weights_hash(model)[:8]}" for name, model in models.items()
                       if name != "f" and model is not None)  # fmt: skip
    targeted = any(ATTACKERS[name].target != "none" for name in given.attackers)
    drawn = "once" if given.averages == 1 else f"{given.averages} times, and the probabilities averaged"
    notes = [
        "Denominator: all test images right at first that were attacked, up to the one that completes the wanted "
        "number of successes on f (test pairs); where an attack of a fixed radius failed its last candidate counts, "
        "where another did the clean image. The clean line: the "
        f"first {given.clean} test images, right at first or not; for ours the mean over the attackers' defences.",
        "pipeline: the detectors decide, an image judged clean is answered by f, the others by f_rec on suppressed "
        "images. oracle: every attacked image goes to f_rec, or to f itself (without fine-tuning).",
        "All attacks were made on f alone and know of no defence: figures of this table are no robustness. The "
        "rectifying pipeline was not attacked itself here: attacks on it, and on the detectors where they refuse, are "
        "tables of their own (gcd_rectified_attacked, gcd_white_box). An adversarially trained network is shown "
        f"against attacks on itself, too, of the first {given.own} test images those it gets right; in brackets: 0 by "
        "construction without a radius, but for images whose attack found nothing; how far such an attack must go "
        "stands on the second page.",
        f"Each rectified image was drawn {drawn}; f_rec saw patches of the attacker's training images.",
        "The paper's figures: Li et al. 2020, table 5, VGG-11; its MNIST block starts from a base accuracy of .92, "
        "unlike its other tables (.99).",
    ]
    if targeted:
        notes.append(f"Targeted attackers stand at both of the paper's values of alpha, {ALPHA[setup.data]} and "
                     f"{ALPHA_TARGETED[setup.data]}: a defender does not know which attacker he faces.")  # fmt: skip
    notes += [f"No network for: {', '.join(lacking)}."] if lacking else []
    notes += [f"Weights: {hashes}."] if hashes else []
    return notes + [told(setup.protocol(name)) + f", targets: {ATTACKERS[name].target}" for name in given.attackers]


def _settings(bench: Bench, given: argparse.Namespace) -> dict[str, object]:
    setup = bench.setup
    base = f"{setup.base_path.name} (weights {weights_hash(setup.base)[:8]})"
    return {
        "data": setup.data, "size": setup.size, "base": base,
        "training pairs": setup.train_pairs, "test pairs": setup.test_pairs,
        "detectors' epochs": setup.epochs or "as configured", "rectifier's epochs": bench.epochs or "as configured",
        "mode": bench.mode, "share": bench.share, "averages": bench.averages, "seed": bench.seed,
    }  # fmt: skip


def _papers(data: str, name: str) -> list[str]:
    return list(PAPER[data].get(name, ("",) * len(PAPER_HEADS)))


def _mean(values: Tensor) -> str:
    return percent(float(values.double().mean()) if len(values) else None)


if __name__ == "__main__":
    main()
