"""GCD's rectifying pipeline under attack: by its own gradient, and by images that hide from its detectors.

    python -m lit_adv.experiments.gcd_rectified_attacked --images 50

The pipeline answers every image, those that its detectors find by the rectifier. Its own gradient (BPDA through the
suppression, averaged over draws) leads to images that fool the rectifier and never tries to hide from the detectors.
The other way to win is to hide: images made against the same detectors with a refusal are tried on the pipeline, which
answers what it does not find by the bare classifier. Robust accuracy is that of the worst case image by image. The
detectors and the rectifier learnt from all eight attackers; broken off, the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_adv.archive import weights_hash
from lit_adv.attacks import DDN, PGD, Square, Transfer
from lit_adv.defenses import GuidedComplementary
from lit_adv.evaluation import evaluate
from lit_adv.experiments.gcd_rectified import Bench
from lit_adv.experiments.gcd_setup import ALPHA, ATTACKERS, Setup, at_least, command_line
from lit_adv.experiments.page import Page, told
from lit_adv.losses import Combined
from lit_adv.metrics import Records, wilson, worst_case
from lit_adv.protocol import Protocol
from lit_adv.tables import interval, percent
from lit_adv.threat import ThreatModel

L2 = 2.0


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Train what is missing, attack, write the table."""
    given, setup = command_line(__doc__, arguments, Path("runs/gcd_rectified_attacked"), _flags)
    bench = Bench(setup, given.folder / setup.tag)
    defence = bench.rectified(list(ATTACKERS), ALPHA[setup.data])
    data = setup.images()
    rows, notes = [], []
    for name, protocols in ways(setup, defence, given).items():
        report = evaluate(
            defence, data, protocols, dirpath=given.folder / setup.tag / name, max_samples=given.images,
            name=f"GCD, rectifying, {name}", progress=True, audit=False,
        )  # fmt: skip
        records = {protocol.name: outcome.records for protocol, outcome in zip(protocols, report.outcomes, strict=True)}
        rows += [row(name, way, found) for way, found in records.items()]
        rows.append(row(name, "worst case per image", worst_case(list(records.values()))))
        notes += [told(protocol) for protocol in protocols]
    page = Page("GCD, rectifying, attacked", _settings(setup, defence, given), HEADS, rows, [*NOTES, *notes])
    print(page)
    files = page.write(given.folder / setup.tag, "rectified_attacked")
    print("\n".join(map(str, files)))
    return files


HEADS = (
    "threat",
    "attack",
    "images",
    "right when clean, %",
    "robust accuracy, %",
    "95 % interval",
    "mean L2 of successes",
)
NOTES = (
    "Robust accuracy: of all images, those right when clean (in most of 30 draws) and not broken (in most of 30 fresh "
    "draws).",
    "own gradient: through the answer that the pipeline gives, BPDA with the identity through the suppression, "
    "averaged over 20 draws. hiding: made against the same detectors with a refusal, tried on the pipeline once.",
)


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=at_least(1), default=50, help="test images, from the first on")
    parser.add_argument("--queries", type=at_least(1), default=1000, help="of Square, per image")


def ways(setup: Setup, defence: GuidedComplementary, given: argparse.Namespace) -> dict[str, list[Protocol]]:
    """All attacks, by threat."""
    refusing = defence.variant(answer="reject")
    linf = setup.protocol("PGD-U").attack
    assert isinstance(linf, PGD)
    ball = linf.threat
    far = ThreatModel("l2", L2)

    def pgd(loss: object = None) -> PGD:
        chosen = {} if loss is None else {"loss": loss}
        return PGD(ball, linf.steps, linf.step_size, random_start=False, **chosen)  # type: ignore[arg-type]

    hiding = [("", None), ("_beta0.1", Combined(0.1)), ("_beta1", Combined(1.0))]
    ddn = [("", DDN(far)), ("_beta1", DDN(far, loss=Combined(1.0)))]
    return {
        f"linf {ball.radius:g}": [
            Protocol(name="pgd_own_gradient", attack=pgd()),
            *(Protocol(name=f"pgd_hiding{tag}", attack=Transfer(pgd(loss), [refusing])) for tag, loss in hiding),
            Protocol(name="square", attack=Square(ball, steps=given.queries), budget=40 * given.queries),
        ],
        f"l2 {L2:g}": [
            Protocol(name="ddn_own_gradient", attack=DDN(far)),
            *(Protocol(name=f"ddn_hiding{tag}", attack=Transfer(attack, [refusing])) for tag, attack in ddn),
        ],
    }


def row(threat: str, attack: str, records: Records) -> list[str]:
    """A line of the table."""
    images = len(records)
    right, broken = records.clean_correct, records.verified & records.clean_correct
    robust = int((right & ~broken).sum())
    ends = wilson(robust, images)
    mean = f"{records.l2[broken].double().mean():.2f}" if broken.any() else ""
    shares = [percent(count / images) if images else "" for count in (int(right.sum()), robust)]
    return [threat, attack, f"{images}", *shares, interval(ends), mean]


def _settings(setup: Setup, defence: GuidedComplementary, given: argparse.Namespace) -> dict[str, object]:
    return {
        "data": f"{setup.data}, the first {given.images} test images", "size": setup.size, "alpha": defence.alpha,
        "share": defence.share, "defence": f"weights {weights_hash(defence)[:8]}, learnt from all eight attackers",
    }  # fmt: skip


if __name__ == "__main__":
    main()
