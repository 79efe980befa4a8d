"""Figure 7 of adversarial transformation: draws of g over which the attacker averages, for two radii of g.

    python -m lit_adv.experiments.eot_samples
    python -m lit_adv.experiments.eot_samples --data cifar10 --full

The first trains two f_a on some MNIST images and attacks with up to 16 draws: minutes on two CPU cores. The second is
the paper's size, up to 500 draws. A last line attacks with a radius of half the pixel range, where nothing can be left
to defend: if something is, the attack is at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_adv.defenses.adversarial_transformation import AdversarialTransformation
from lit_adv.experiments.page import Curve, Page, figure
from lit_adv.experiments.transformation import (
    COUNTING,
    MASKING,
    Bench,
    Standing,
    percent,
    robust,
    spread,
)
from lit_adv.experiments.transformation_setup import Size, command_line
from lit_adv.protocol import Protocol
from lit_adv.threat import ThreatModel

SIZES = {
    "samples": Size((1, 4, 16), (1, 2, 5, 10, 20, 50, 100, 200, 500), "draws S of a gradient"),
    "deltas": Size((), (), "radii of g; none: the two of the data", float),
}
HEADS = (
    "Delta", "S", "eps", "clean: one draw", "BPDA-I: one draw", "BPDA-I: most draws", "BPDA-I: all draws",
    "f_b gradients per image",
)  # fmt: skip
LARGE = 0.5


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Train what is missing, attack with every number of draws, write table and figure."""
    given = command_line(__doc__, SIZES, arguments)
    bench = Bench(given)
    samples = sorted(given.samples)
    rows: list[list[str]] = []
    lines = []
    for delta in sorted(given.deltas or bench.family.pair):
        defence = bench.defence(delta=delta)
        clean = bench.standard(defence)
        found = [attacked(bench, defence, count, bench.family.eps) for count in samples]
        rows += [row(bench, defence, n, bench.family.eps, clean, each) for n, each in zip(samples, found, strict=True)]
        sane = attacked(bench, defence, samples[0], LARGE)
        rows.append(row(bench, defence, samples[0], LARGE, clean, sane))
        for line in rows[-len(samples) - 1 :]:
            print(" | ".join(line), flush=True)
        lines.append(Curve(f"BPDA-I, Delta {delta:g}", samples, [100 * each.mean for each in found]))
        lines.append(Curve(f"clean, Delta {delta:g}", samples, [100 * clean.mean] * len(samples)))
    settings = bench.settings(defence, BPDA=bench.white_box, Delta="retrained for each, step Delta / 6")
    page = Page("BPDA-I against the number of EOT samples (figure 7)", settings, HEADS, rows, NOTES)
    files = page.write(bench.folder, "eot_samples")
    drawn = figure(bench.folder / "eot_samples.png", lines, "S, draws of a gradient", "accuracy, %", log=True)
    print(f"{page}\n{files[0]}")
    return [*files, drawn]


def attacked(bench: Bench, defence: AdversarialTransformation, samples: int, eps: float) -> Standing:
    """What stays right under BPDA-I along the mean gradient of so many draws."""
    attack = bench.pgd(samples)
    if eps != bench.family.eps:
        attack = attack.with_threat(ThreatModel("linf", eps))
        attack.step_size = 2.5 * eps / attack.steps
    protocol = Protocol(name=f"bpda_i_S{samples}_eps{eps:g}", attack=attack, draws=bench.given.judges)
    return robust(bench.tried(defence, f"delta{defence.delta:g}", protocol))


def row(
    bench: Bench, defence: AdversarialTransformation, samples: int, eps: float, clean: Standing, found: Standing
) -> list[str]:
    """The cells of one attack."""
    price = bench.given.steps * samples * defence.steps
    return [
        f"{defence.delta:g}", str(samples), f"{eps:g}" + " (sanity)" * (eps == LARGE), spread(clean),
        percent(found.mean), percent(found.majority), percent(found.all), f"{price:,}",
    ]  # fmt: skip


NOTES = (
    "Paper (CIFAR-10, a figure without a table): at Delta 0.1 more samples help the attacker up to about 100 and then "
    "level off, at 0.2 they do not help. Its figure cannot be read off as numbers.",
    "f_b gradients per image: the price of an attack, which runs to its end.",
    COUNTING,
    MASKING,
)


if __name__ == "__main__":
    main()
