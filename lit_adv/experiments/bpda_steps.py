"""Figure 5 of adversarial transformation: BPDA with smooth operators against the number of steps of g.

    python -m lit_adv.experiments.bpda_steps
    python -m lit_adv.experiments.bpda_steps --data cifar10 --full

The first trains an f_a for each number of steps on some MNIST images: a quarter of an hour on two CPU cores. The second
is the paper's size. All are attacked without g's random start, so that one draw is all there is. Beside the smooth
operators as the paper has them stand those whose argument is divided by the median size of the gradient, for a raw
gradient is so small that a smooth sign of it is a straight line; BPDA-I; and the cosine between the gradients.
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
    cosines,
    percent,
    robust,
)
from lit_adv.experiments.transformation_setup import Size, command_line
from lit_adv.protocol import Protocol

SIZES = {"of_g": Size((1, 2, 3, 5, 8, 13), (1, 2, 3, 5, 8, 13), "numbers of steps N of g")}
SMOOTH = {
    "softsign": "softsign",
    "tanh": "tanh",
    "softsign_scaled": "softsign, scaled",
    "tanh_scaled": "tanh, scaled",
}  # surrogates of the defence, and how they are called here
HEADS = (
    "N", "clean", "BPDA-I", *SMOOTH.values(), *(f"cosine to BPDA-I: {name}" for name in SMOOTH.values()),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Train what is missing, attack every number of steps, write table and figure."""
    given = command_line(__doc__, SIZES, arguments)
    bench = Bench(given)
    rows: list[list[str]] = []
    shares: list[list[float]] = []
    for steps in sorted(given.of_g):
        defence = bench.defence(steps=steps).variant(random_start=False)
        shares.append(accuracies(bench, steps, defence))
        rows.append([str(steps), *map(percent, shares[-1]), *likeness(bench, defence)])
        print(" | ".join(rows[-1]), flush=True)
    page = Page(
        "BPDA against the number of steps of g (figure 5)",
        bench.settings(defence, BPDA=bench.white_box, N="retrained for each", temperature="1; scaled: median")
        | {"draws by which an image is judged": 1},
        HEADS,
        rows,
        NOTES,
    )
    files = page.write(bench.folder, "bpda_steps")
    names = ("clean", "BPDA-I", *SMOOTH.values())
    lines = [
        Curve(name, sorted(given.of_g), [100 * found[place] for found in shares]) for place, name in enumerate(names)
    ]
    drawn = figure(bench.folder / "bpda_steps.png", lines, "N, steps of g", "accuracy, %")
    print(f"{page}\n{files[0]}")
    return [*files, drawn]


def accuracies(bench: Bench, steps: int, defence: AdversarialTransformation) -> list[float]:
    """Of the defence without random start: clean, under BPDA-I, under each smooth BPDA."""
    found = [bench.standard(defence).mean]
    for surrogate in (None, *SMOOTH):
        protocol = Protocol(name=f"bpda_{surrogate or 'i'}", attack=bench.pgd(1), surrogate=surrogate)
        found.append(robust(bench.tried(defence, f"steps{steps}", protocol)).mean)
    return found


def likeness(bench: Bench, defence: AdversarialTransformation) -> list[str]:
    """Mean cosine between each smooth BPDA's gradient and BPDA-I's, on clean images."""
    x, y, _ = bench.images()

    def measured() -> list[float]:
        return [cosines(defence, x, y, name).nanmean().item() for name in SMOOTH]

    return [f"{value:.3f}" for value in bench.kept("cosines", defence, {"of": list(SMOOTH)}, measured)]


NOTES = (
    "Paper (CIFAR-10, a figure without a table): BPDA succeeds for few steps and the defence is robust once N > 5; "
    "elsewhere in its text N <= 2 is vulnerable and N > 4 is safe. Its figures cannot be read off as numbers.",
    "A cosine near 1 says that the smooth operators find nothing that the identity does not: then N stops nothing.",
    "Cosines are means over images whose gradients are both other than 0; delta is the state of the smooth g.",
    COUNTING,
    MASKING,
)


if __name__ == "__main__":
    main()
