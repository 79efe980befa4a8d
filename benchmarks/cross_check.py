"""Our white-box attacks beside those of other libraries: the same network, images and settings, the same findings?

    python -m venv peers && . peers/bin/activate
    pip install -e . foolbox torchattacks adversarial-robustness-toolbox
    pip install --no-deps adv-lib
    LIT_ADV_DATA=... python benchmarks/cross_check.py [--only "C&W l2" ...] [--models small a] [--images 200]

The libraries are no dependencies: those that are not installed are named and left out; adv-lib works without visdom
here. Each attacks the first MNIST test images that the network classifies rightly. What it returns is checked here:
finite, in the box (what lies a millionth beyond is moved back first), in the ball up to a millionth, and misclassified
by the bare network.

Nothing random where the method has nothing random: FGSM and PGD begin at the image. Goals: success not more than 2
points below theirs, median distance not more than 3 % above theirs.
"""

import argparse
import importlib.util
import json
import platform
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cross_check_peers import CONTESTS, Contest
from nets import mnist_small, model_a, right_images
from peers_adapters import Peer
from peers_measure import valid
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lit_adv.cli import keep_memory

POINTS, LONGER = 2.0, 1.03
SLACK = 1e-6


@dataclass(frozen=True)
class Outcome:
    """What an attack did to each image.

    Attributes:
        broken: (n,) bool, checked here. distance: (n,) in the attack's norm, inf where unbroken. l2: the same in L2.
        seconds: of the processor.
    """

    broken: Tensor
    distance: Tensor
    l2: Tensor
    seconds: float


@dataclass(frozen=True)
class Figures:
    """One row of the table.

    Attributes:
        success: per cent. median: where the nearest image is wanted, of its distance in the attack's norm over all
            images, inf if unbroken; else of the L2 distance over those broken.
        points: our success less theirs. ratio: our median over theirs; with a radius over images that both broke.
        ms: of the processor per image.
    """

    attack: str
    model: str
    library: str
    words: str
    images: int = 0
    success: float | None = None
    median: float | None = None
    points: float | None = None
    ratio: float | None = None
    ms: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether ours does as well; None where there is nothing to compare."""
        if self.points is None:
            return None
        return self.points >= -POINTS and (self.ratio is None or self.ratio <= LONGER)

    def cells(self) -> tuple[str, ...]:
        """The table's cells, from the number of images on."""
        if self.success is None:
            return ("",) * 7
        points = "" if self.points is None else f"{self.points:+.1f}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        verdict = "" if self.met is None else "[green]met[/]" if self.met else "[red]missed[/]"
        if self.met and self.points is not None and self.points > POINTS:
            verdict = "[yellow]met: we break more[/]"
        median = "-" if self.median is None else f"{self.median:.4f}"
        return (f"{self.images}", f"{self.success:.1f}", median, points, ratio, verdict, f"{self.ms:.1f}")


def main() -> None:
    """Measure, print the table, write the figures if asked."""
    options = _options()
    torch.set_num_threads(1)
    keep_memory()
    console = Console()
    found: list[Figures] = []
    for model in options.models:
        net = mnist_small() if model == "small" else model_a(options.checkpoint)
        net.requires_grad_(False)
        x, y = right_images(net, options.images)
        for attack in options.only:
            few = CONTESTS[attack].slow and model != "small"
            count = min(options.few, len(x)) if few else len(x)
            for figures in contest(attack, model, net, x[:count], y[:count]):
                found.append(figures)
                console.print(f"{model}, {attack}, {figures.library}:", *figures.cells(), style="dim")
    console.print(_table(found))
    if options.json is not None:
        record = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        rows = [asdict(row) | {"met": row.met} for row in found]
        options.json.write_text(json.dumps(record | {"rows": rows}, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=list(CONTESTS), help="attacks to compare")
    parser.add_argument("--models", nargs="+", choices=("small", "a"), default=["small"], help="networks to attack")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/model_a.ckpt"), help="of Model A")
    parser.add_argument("--images", type=int, default=200, help="images right at first")
    parser.add_argument("--few", type=int, default=40, help="images of long attacks on Model A")
    parser.add_argument("--json", type=Path, default=None, help="file for all figures")
    return parser.parse_args()


def contest(attack: str, model: str, net: nn.Module, x: Tensor, y: Tensor) -> Iterator[Figures]:
    """Ours first, then each library against it."""
    given = CONTESTS[attack]
    ours = run(given.ours, given, net, x, y)
    yield compared(Figures(attack, model, given.ours.library, given.ours.words), None, ours, given)
    for peer in given.peers:
        if importlib.util.find_spec(peer.module) is None:
            yield Figures(attack, model, peer.library, "not installed")
            continue
        try:
            theirs = run(peer, given, net, x, y)
        except Exception as problem:  # of whatever kind: the others shall be compared all the same
            yield Figures(attack, model, peer.library, f"failed: {type(problem).__name__}: {problem}")
            continue
        yield compared(Figures(attack, model, peer.library, peer.words), ours, theirs, given)


def run(peer: Peer, given: Contest, net: nn.Module, x: Tensor, y: Tensor) -> Outcome:
    """One attack on all images, checked."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what the libraries draw from
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attack = peer.prepare(net, given.task)
        begun = time.process_time()
        found = attack(x.clone(), y.clone(), None)
        seconds = time.process_time() - begun
    near = found.clamp(0, 1)
    found = torch.where((near - found).abs() <= SLACK, near, found)
    with torch.no_grad():
        logits = torch.cat([net(part) for part in torch.split(found, 64)])
    broken = valid(found, logits, x, y, None, given.task)
    difference = (found.double() - x.double()).flatten(1)
    lengths = {"l2": difference.norm(dim=1), "linf": difference.abs().amax(1)}
    distance, l2 = (lengths[norm].masked_fill(~broken, torch.inf) for norm in (given.norm, "l2"))
    return Outcome(broken, distance, l2, seconds)


def compared(row: Figures, ours: Outcome | None, theirs: Outcome, given: Contest) -> Figures:
    """The row's figures, with the differences to ours where there are ours."""
    images = len(theirs.broken)
    nearest = given.eps == float("inf")
    kept = theirs.distance if nearest else theirs.l2[theirs.broken]
    success = 100 * float(theirs.broken.double().mean())
    points = ratio = None
    if ours is not None:
        points = 100 * float(ours.broken.double().mean()) - success
        both = ours.broken & theirs.broken
        pair = (ours.distance, theirs.distance) if nearest else (ours.l2[both], theirs.l2[both])
        ratio = _ratio(*pair)
    return replace(
        row,
        images=images,
        success=success,
        median=float(kept.median()) if len(kept) else None,
        points=points,
        ratio=ratio,
        ms=1000 * theirs.seconds / images,
    )


def _ratio(ours: Tensor, theirs: Tensor) -> float | None:
    if not len(ours):
        return None
    first, second = float(ours.median()), float(theirs.median())
    return None if second in (0, float("inf")) else first / second


def _table(found: list[Figures]) -> Table:
    table = Table(
        title=f"torch {torch.__version__}, one thread",
        caption=(
            f"Ours less theirs in points, ours over theirs in the median distance. Met: not more than {POINTS:g} "
            f"points below, not more than {LONGER - 1:.0%} further. Medians: of nearest images over all images, "
            "unbroken ones infinitely far, in the attack's norm; within a radius L2 over the broken ones."
        ),
    )
    for heading in ("attack", "library and settings"):
        table.add_column(heading)
    for heading in ("images", "success %", "median", "points", "ratio", "goals", "ms an image"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = ""
    for row in found:
        name = f"{row.attack}, {row.model}"
        if name != before:
            table.add_section()
        table.add_row("" if name == before else name, f"{row.library}\n[dim]{row.words}[/]", *row.cells())
        before = name
    return table


if __name__ == "__main__":
    main()
