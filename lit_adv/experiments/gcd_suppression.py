"""Table 1 of GCD: adversarial images lose their effect where the pixels that a detector looks at are taken out.

    python -m lit_adv.experiments.gcd_suppression

The attackers know the classifier f alone. Of each image that fooled it, the share of values to which the sensitivity
detector's margin is most sensitive is set to 0, and f is asked again. Below stands the same with as many values chosen
at random, of all or of those that are not black already, and what either does to f's accuracy on the clean images:
information is lost, too. Two readings of the paper's dL/dx_i: the sensitivity to the image, through the gradient map,
or to the map itself.

The paper's figures: Li et al. 2020, table 1 (VGG-11; the data set is not named).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_adv.archive import weights_hash
from lit_adv.datamodules.attacked import AttackedBatch
from lit_adv.defenses import GuidedComplementary
from lit_adv.draws import Draws
from lit_adv.experiments.gcd_setup import ATTACKERS, Setup, command_line, share
from lit_adv.experiments.page import Curve, Page, figure, told
from lit_adv.metrics.summary import wilson
from lit_adv.suppression import suspects
from lit_adv.tables import percent

Reading = Literal["image", "map", "random", "bright"]
READINGS: tuple[Reading, ...] = get_args(Reading)
NAMES = {
    "image": "sensitivity to the image",
    "map": "sensitivity to the gradient map",
    "random": "at random",
    "bright": "at random, of values above 1/255",
}
SHARES = (0.0, 0.05, 0.1, 0.3)
PAPER = {
    "DFool-U": {0.0: "1.000", 0.05: ".637", 0.1: ".780"},
    "CW-U": {0.0: "1.000", 0.05: ".665", 0.1: ".794"},
    "DDN-U": {0.0: "1.000", 0.05: ".656", 0.1: ".785"},
}
"""The paper's table 1: share of successes left, by attacker and share of pixels set to 0."""

BLACK = 1 / 255 + 1e-6
"""What lies above is more than 1/255, whatever the rounding of floats."""

_KEY = -31
_CHUNK = 128


class Left(NamedTuple):
    """What is left after values were set to 0, (shares, n) each.

    Attributes:
        success: whether f is still wrong on the adversarial image. clean: whether f is still right on the clean one.
        changed: values of the adversarial image set to 0 that were above 1/255 before.
    """

    success: Tensor
    clean: Tensor
    changed: Tensor


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Make what is missing, zero, ask, write the table and the figure."""
    given, setup = command_line(__doc__, arguments, Path("runs/gcd_suppression"), _flags)
    readings: tuple[Reading, ...] = (*given.readings, *(("random", "bright") if given.random else ()))
    found: dict[tuple[str, Reading], Left] = {}
    for attacker in given.attackers:
        defence = GuidedComplementary(setup.base, sensitivity_detector=setup.detector("sensitivity", [attacker])).eval()
        pairs = setup.test(attacker)
        for reading in readings:
            found[attacker, reading] = left(defence, pairs, given.shares, reading)
    page, folder = table(setup, found, given), given.folder / setup.tag
    print(page)
    files = page.write(folder, "suppression")
    files.append(_figure(folder / "suppression.png", found, given.shares))
    print("\n".join(map(str, files)))
    return files


def _flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shares", nargs="+", type=share, default=list(SHARES), help="of values set to 0, each in [0, 1]")
    add("--readings", nargs="+", default=["image", "map"], choices=("image", "map"), help="of the sensitivity")
    add("--random", action=argparse.BooleanOptionalAction, default=True, help="also values chosen at random")
    parser.set_defaults(attackers=list(PAPER))


def left(defence: GuidedComplementary, pairs: AttackedBatch, shares: Sequence[float], reading: Reading) -> Left:
    """What is left of attack and accuracy after each share of values was set to 0.

    Args:
        defence: of the sensitivity detector alone. pairs: whose attack succeeded.
    """
    success, clean, changed = [], [], []
    for rows in torch.split(torch.arange(len(pairs.label)), _CHUNK):
        label, index = pairs.label[rows], pairs.index[rows]
        classes, many = _asked(defence, pairs.x_adv[rows], index, shares, reading)
        success.append(classes != label)
        changed.append(many)
        clean.append(_asked(defence, pairs.image[rows], index, shares, reading)[0] == label)
    return Left(torch.cat(success, 1), torch.cat(clean, 1), torch.cat(changed, 1))


def _asked(
    defence: GuidedComplementary, x: Tensor, index: Tensor, shares: Sequence[float], reading: Reading
) -> tuple[Tensor, Tensor]:
    """Classes by f after each share of values was set to 0, and how many of these were not black, (shares, n) each."""
    if reading in ("random", "bright"):
        order = Draws(0, index, torch.zeros_like(index), _KEY).uniform(*x.shape[1:])
        if reading == "bright":  # black values come last, and are not taken where there are no others
            order = order.masked_fill(x <= BLACK, 0)
    else:
        order = defence.variant(reading=reading).sensitivity(x)
    with torch.no_grad():
        masks = [suspects(order, part, "quantile", defence.joint) for part in shares]
        classes = torch.stack([defence.classifier(x.masked_fill(mask, 0.0)).argmax(-1) for mask in masks])
    return classes, torch.stack([(mask & (x > BLACK)).flatten(1).sum(1) for mask in masks])


def table(setup: Setup, found: dict[tuple[str, Reading], Left], given: argparse.Namespace) -> Page:
    """Table 1, shares of successes left, the paper's below ours."""
    rows = []
    for (attacker, reading), one in found.items():
        if reading == given.readings[0] and attacker in PAPER:
            cells = [PAPER[attacker].get(part, "") for part in given.shares]
            rows.append([f"{attacker} (paper)", "", "", *cells, *([""] * 2 * len(given.shares))])
        images = one.success.shape[1]
        ours = [_share(int(row.sum()), images) for row in one.success]
        clean = [percent(float(row.double().mean())) for row in one.clean]
        changed = [f"{float(row.double().mean()):.1f}" for row in one.changed]
        rows.append([attacker, NAMES[reading], f"{images}", *ours, *clean, *changed])
    heads = ["attacker", "values set to 0", "images"]
    heads += [f"success left, {100 * part:g} %" for part in given.shares]
    heads += [f"clean accuracy, {100 * part:g} %, %" for part in given.shares]
    heads += [f"values really changed, {100 * part:g} %" for part in given.shares]
    notes = [
        "Success left: share of the images that fooled f which f still gets wrong, with the 95 % interval; "
        "at 0 % it is 1 by definition. Of each channel, the share of largest |dm/dx| of the sensitivity detector's "
        "margin m is set to 0; ties with the first value left out are left out too.",
        "Clean accuracy: of f on the clean images of the same pairs, all right at first, treated in the same way.",
        "The detector was trained on the same attacker's successes on training images. Where an image is black already "
        "nothing is taken out: values really changed are those above 1/255 before, a mean over the adversarial images. "
        "At random, of values above 1/255: as many as are wanted, or all there are.",
        "The paper: Li et al. 2020, table 1, VGG-11, on a data set not named; 0.05 and 0.1 alone.",
        *(
            told(setup.protocol(name)) + f", targets: {ATTACKERS[name].target}"
            for name in dict.fromkeys(name for name, _ in found)
        ),
    ]
    base = f"{setup.base_path.name} (weights {weights_hash(setup.base)[:8]})"
    settings = {"data": setup.data, "size": setup.size, "base": base, "training pairs": setup.train_pairs,
                "test pairs": setup.test_pairs, "detectors' epochs": setup.epochs or "as configured"}  # fmt: skip
    return Page("GCD: successes left without the most sensitive pixels (table 1)", settings, heads, rows, notes)


def _share(count: int, images: int) -> str:
    ends = wilson(count, images)
    return "" if ends is None else f"{count / images:.3f} [{ends.low:.3f}, {ends.high:.3f}]"


def _figure(path: Path, found: dict[tuple[str, Reading], Left], shares: Sequence[float]) -> Path:
    curves = []
    for (attacker, reading), one in found.items():
        curves.append(Curve(f"{attacker}, {NAMES[reading]}", [100 * part for part in shares],
                            (100 * one.success.double().mean(1)).tolist()))  # fmt: skip
    for attacker, told_of in PAPER.items():
        if any(name == attacker for name, _ in found):
            x, y = [100 * part for part in told_of], [100 * float(value) for value in told_of.values()]
            curves.append(Curve(f"{attacker}, the paper", x, y, paper=True))
    return figure(path, curves, "values set to 0, %", "successes left, %")


if __name__ == "__main__":
    main()
