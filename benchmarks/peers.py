"""Our attacks beside those of other libraries, on the same network, images, radius and budget of queries.

    python -m venv peers && . peers/bin/activate
    pip install -e . foolbox torchattacks adversarial-robustness-toolbox
    LIT_ADV_DATA=... python benchmarks/peers.py [--only NES ...] [--models small a] [--checkpoint model_a.ckpt]

The libraries are no dependencies: those that are not installed are named and left out. Everything runs on one thread of
the processor and is timed in its seconds, against the bare forwards over as many images in the best batch size, taken
in turn with it. Queries are counted at the model by a hook, in a run of its own; successes are checked here: finite, in
the box, in the ball up to a millionth, and misclassified by the bare model.
"""

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import peers_ours
import torch
from limits import best_size
from nets import mnist_small, model_a, right_images
from peers_adapters import PEERS, Norm, Task
from peers_measure import Figures, Victim, measure
from rich.console import Console
from rich.table import Table

from lit_adv.cli import keep_memory


@dataclass(frozen=True)
class Contest:
    """An attack's task and what is wanted.

    Attributes:
        norm: of the ball. budget: times the queries that are asked for on the command line.
        targeted: at the runner-up class. goal: how many times less of the processor per broken image than the best
            library. limit: largest ratio of the time to that of the bare forwards, on the small network and on Model A.
    """

    norm: Norm
    budget: int = 1
    targeted: bool = False
    goal: float | None = None
    limit: tuple[float, float] = (1.3, 1.05)


SMALL_STEPS = (1.5, 1.5)  # one new image per row and step
CONTESTS = {
    "NES": Contest("linf", goal=2),
    "SPSA": Contest("linf"),
    "Square": Contest("linf", goal=2, limit=SMALL_STEPS),
    "SimBA": Contest("l2", goal=2, limit=SMALL_STEPS),
    "HopSkipJump": Contest("l2", goal=4),
    "Boundary": Contest("l2", budget=5, limit=SMALL_STEPS),
    "GenAttack": Contest("linf", targeted=True, goal=4),
    "Bandits": Contest("linf", goal=4),
    "ZOO": Contest("l2", budget=20, goal=15),
    "NAttack": Contest("linf"),
    "PSO": Contest("linf"),
    "FD with RG-8": Contest("linf"),
}
SIZES = {"small": (64, 128, 256, 512, 1024), "a": (16, 32, 64, 128)}


def main() -> None:
    """Measure, print the table, write the figures if asked."""
    options = _options()
    torch.set_num_threads(1)
    keep_memory()  # as train.py and evaluate.py do; all gain by it
    console = Console()
    found: list[Figures] = []
    for model in options.models:
        victim = _victim(model, options)
        for attack in options.only:
            for figures in _contest(attack, victim, options):
                found.append(figures)
                console.print(f"{model}, {attack}, {figures.library}: {figures.short()}", style="dim")
    console.print(_table(found, options))
    if options.json is not None:
        record = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        options.json.write_text(json.dumps(record | {"rows": [asdict(row) for row in found]}, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=list(CONTESTS), help="attacks to measure")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["small"], help="networks to attack")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/model_a.ckpt"), help="of Model A")
    parser.add_argument("--images", type=int, default=None, help="images; default 64 (small) and 16 (a)")
    parser.add_argument("--budget", type=int, default=1000, help="queries per image; Boundary 5 times, ZOO 20 times")
    parser.add_argument("--linf", type=float, default=0.3, help="radius of attacks in linf")
    parser.add_argument("--l2", type=float, default=3.0, help="radius of attacks in l2")
    parser.add_argument("--patience", type=float, default=30, help="seconds after which fewer images must do")
    parser.add_argument("--ours", action="store_true", help="leave the other libraries out")
    parser.add_argument("--json", type=Path, default=None, help="file for all figures")
    return parser.parse_args()


def _victim(model: str, options: argparse.Namespace) -> Victim:
    net = mnist_small() if model == "small" else model_a(options.checkpoint)
    x, y = right_images(net, options.images or (64 if model == "small" else 16))
    with torch.no_grad():
        runner_up = torch.cat([net(part) for part in torch.split(x, 64)]).topk(2).indices[:, 1]
    size = best_size(net, x.shape[1:], SIZES[model], time.process_time)
    return Victim(model, net, x, y, runner_up, size)


def _contest(attack: str, victim: Victim, options: argparse.Namespace) -> Iterator[Figures]:
    contest = CONTESTS[attack]
    eps = options.linf if contest.norm == "linf" else options.l2
    task = Task(contest.norm, eps, contest.budget * options.budget)
    rivals = [] if options.ours else PEERS.get(attack, [])
    found = []
    for peer in (*rivals, *peers_ours.OURS.get(attack, [])):
        if importlib.util.find_spec(peer.module) is None:
            yield Figures(attack, victim.name, peer.library, "not installed", note="not installed")
            continue
        found.append(measure(attack, victim, peer.sized(task), task, contest.targeted, options.patience))
        yield _judged(found[-1], found[:-1], contest)


def _judged(row: Figures, others: list[Figures], contest: Contest) -> Figures:
    """Ours with its goals, and how many times faster per broken image it is than the best library."""
    if row.library != "lit_adv":
        return row
    row = replace(row, limit_goal=contest.limit[row.model != "small"])
    rivals = [other for other in others if other.broken and not other.altered and other.library != "lit_adv"]
    if not rivals:
        return row
    best = min(other.seconds / other.broken for other in rivals)
    return replace(row, factor=best / (row.seconds / row.broken) if row.broken else 0.0, factor_goal=contest.goal)


def _table(found: list[Figures], options: argparse.Namespace) -> Table:
    table = Table(
        title=f"linf {options.linf:g}, l2 {options.l2:g}, torch {torch.__version__}, one thread",
        caption=(
            "queries: mean over all images; to hit: mean over broken ones, to the first valid hit. ms: processor, per "
            "broken image. x limit: over the bare forwards of as many images; x useful: of those up to the first hits. "
            "after: share of queries after the first valid hit. faster: than the best library, per broken image. No "
            "library on PyPI has Bandits, NAttack, PSO and finite differences in groups."
        ),
    )
    for heading in ("attack", "library and settings"):
        table.add_column(heading)
    for heading in ("images", "broken", "queries", "to hit", "ms", "x limit", "x useful", "after", "MB", "faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = ""
    for row in found:
        name = f"{row.attack}, {row.model}"
        if name != before:
            table.add_section()
        words = f"{row.library}\n[dim]{row.words}[/]"
        table.add_row("" if name == before else name, words, *row.cells())
        before = name
    return table


if __name__ == "__main__":
    main()
