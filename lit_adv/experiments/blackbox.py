"""Every black-box attack on one MNIST classifier at eps 0.3, beside the figures of the papers.

    python -m lit_adv.experiments.blackbox --checkpoint checkpoints/model_a.ckpt

The first test images, stop at the first hit, up to 20,000 queries; finite differences run their whole schedule on
fewer images, ZOO on fewer still. Broken off, the same command goes on where it stopped. One table is printed and
written (Markdown, CSV). A goal is met where the upper end of the success rate's Wilson interval reaches it.

The papers' figures are of Bhagoji et al. 2018, tables 1, 2 and 5 (Model A, all or the first 1,000 test images): success
over all images and the mean L2 distortion over all of them, successes or not. Ours: success over images right at first;
distortion over those, successes or not.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lit_adv.cli import keep_memory
from lit_adv.datamodules import MNIST, Batch
from lit_adv.experiments.catalogue import protocol_of
from lit_adv.metrics import Records
from lit_adv.metrics.summary import Interval, wilson
from lit_adv.protocol import Protocol
from lit_adv.tasks import Checkpoint
from lit_adv.trial import Trial


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        config: file of the attack. images: at most so many; None: as many as asked for.
        whole: run the whole schedule, whatever is hit. arithmetic: what ``queries - checks`` must then be.
        goal: success rate that is expected. paper: success in per cent and mean L2 distortion of the paper.
        unlimited: no budget, though it stops at the first hit.
    """

    config: str
    images: int | None = None
    whole: bool = False
    arithmetic: int | None = None
    goal: float | None = None
    paper: str = ""
    unlimited: bool = False

    @property
    def name(self) -> str:
        return self.config.removesuffix("_mnist") + ("_whole" if self.whole else "")


LINES = (
    Line("rand_linf_mnist", arithmetic=0, paper="8.5 (6.1)"),
    Line("dom_linf_mnist", arithmetic=0, paper="44.8 (5.6)"),
    Line("transfer_fgs_linf_mnist", arithmetic=0, paper="66.3 (6.2), from B"),
    Line("transfer_ifgs_linf_mnist", arithmetic=0, paper="89.8 (4.75), from B"),
    Line("transfer_ifgs_ensemble_linf_mnist", arithmetic=0, paper="97.1 (4.9), from B and C"),
    Line("fgs_xent_linf_mnist", paper="69.2 (5.9), white box"),
    Line("fgs_logit_linf_mnist", paper="90.1 (5.9), white box"),
    Line("ifgs_xent_linf_mnist", paper="99.5 (4.4), white box"),
    Line("ifgs_logit_linf_mnist", paper="100 (2.1), white box"),
    Line("fd_xent_linf_mnist", paper="51.6 (3.3)"),
    Line("fd_logit_linf_mnist", paper="92.9 (6.1)"),
    Line("ge_rg8_logit_linf_mnist", paper="61.5 (6.0)"),
    Line("ge_pca100_logit_linf_mnist", paper="88.1 (6.0)"),
    Line("ifd_xent_linf_mnist", paper="75.0 (3.6)", images=20, unlimited=True),
    Line("ifd_logit_linf_mnist", whole=True, arithmetic=62_720, images=20, goal=0.99, paper="100 (2.1)"),
    Line("ige_rg8_logit_linf_mnist", goal=0.95, paper="98.4 (1.9)"),
    Line("ige_rg8_logit_linf_mnist", whole=True, arithmetic=7_840, images=20, goal=0.95, paper="98.4 (1.9)"),
    Line("ige_pca100_logit_linf_mnist", goal=0.98, paper="99.9 (2.5)"),
    Line("ige_pca100_logit_linf_mnist", whole=True, arithmetic=8_000, images=20, goal=0.98, paper="99.9 (2.5)"),
    Line("rand_fd_logit_linf_mnist"),
    Line("spsa_linf_mnist", goal=0.95, paper="96.7 (3.9)"),
    Line("pso_linf_mnist", paper="84.1 (5.3)"),
    Line("nes_linf_mnist", goal=0.95),
    Line("nattack_linf_mnist", goal=0.95),
    Line("bandits_linf_mnist"),
    Line("square_linf_mnist", goal=0.95),
    Line("gen_attack_linf_mnist"),
    Line("hop_skip_jump_linf_mnist"),
    Line("simba_l2_mnist"),
    Line("simba_dct_l2_mnist"),
    Line("square_l2_mnist"),
    Line("hop_skip_jump_l2_mnist"),
    Line("boundary_l2_mnist"),
    Line("zoo_l2_mnist", images=10, unlimited=True),
)


@dataclass(frozen=True)
class Found:
    """What a line gave: the images' records, and the shares worth knowing."""

    line: Line
    records: Records
    notes: Sequence[str]


def main() -> None:
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/model_a.ckpt"), help="the classifier")
    parser.add_argument("--data", type=Path, default=None, help="folder of MNIST")
    parser.add_argument("--folder", type=Path, default=Path("runs/blackbox"), help="records and table")
    parser.add_argument("--images", type=int, default=100, help="test images, from the first on")
    parser.add_argument("--budget", type=int, default=20_000, help="queries per image")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="lines whose name holds one of these")
    parser.add_argument("--threads", type=int, default=1, help="threads of the processor")
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(arguments.threads)
    wanted = [line for line in LINES if arguments.only is None or any(part in line.name for part in arguments.only)]
    if not wanted:
        parser.error(f"no line is called {' or '.join(arguments.only)}: {', '.join(line.name for line in LINES)}")
    data = MNIST() if arguments.data is None else MNIST(arguments.data)
    found = []
    for result in measured(Checkpoint(arguments.checkpoint), data, wanted, arguments):
        found.append(result)
        print(" | ".join(cells(result)), flush=True)
    write(found, arguments.folder)


def measured(model: nn.Module, data: MNIST, lines: list[Line], arguments: argparse.Namespace) -> Iterator[Found]:
    """The lines, one after another; records of earlier runs are read, not made again."""
    data.prepare_data()
    data.setup("test")
    for line in lines:
        protocol = protocol_for(line, arguments.images, arguments.budget)
        folder = arguments.folder / "attacks"
        trial = Trial(
            protocol, model, f"{data.name}/test", data.num_classes, folder, progress=True, training=data.training_images
        )
        for batch in data.test_dataloader():
            trial.add(Batch(*batch))
            if trial.full:
                break
        records = trial.close().unique()
        yield Found(line, records, trial.outcome(records).notes)


def protocol_for(line: Line, images: int, budget: int) -> Protocol:
    """How a line is tried: whole schedules have no budget."""
    count = images if line.images is None else min(images, line.images)
    attack = {"stop_at_hit": False} if line.whole else {}
    given = protocol_of(line.config, line.name, attack, max_samples=count)
    if line.whole or line.unlimited:
        return protocol_of(line.config, line.name, attack, max_samples=count, budget=None)
    return protocol_of(line.config, line.name, attack, max_samples=count, budget=min(budget, given.budget or budget))


HEADS = (
    "attack", "images", "success", "95 % interval", "goal", "paper: success (L2)", "mean L2", "mean L2 of successes",
    "mean queries", "median to first hit", "queries - checks", "checks", "arithmetic",
)  # fmt: skip


def cells(found: Found) -> list[str]:
    """A line of the table."""
    line, records = found.line, found.records
    attacked = records[records.clean_correct]
    broken = attacked[attacked.verified]
    rate = wilson(len(broken), len(attacked))
    own = attacked.queries - attacked.checks
    exact = "" if line.arithmetic is None else f"{line.arithmetic:,}"
    if line.arithmetic is not None:
        exact += ": exact" if bool((own == line.arithmetic).all()) else ": NOT met"
    return [
        line.name, f"{len(attacked)}", _per_cent(len(broken), len(attacked)), _span(rate), _goal(line.goal, rate),
        line.paper, _mean(attacked.l2, 2), _mean(broken.l2, 2), _mean(attacked.queries, 0), _median(broken.first_hit),
        _mean(own, 0), _mean(attacked.checks, 1), exact,
    ]  # fmt: skip


def write(found: list[Found], folder: Path) -> None:
    """The table as Markdown and CSV, with what is worth noting below."""
    rows = [cells(result) for result in found]
    table = ["| " + " | ".join(row) + " |" for row in (list(HEADS), ["---"] * len(HEADS), *rows)]
    notes = [f"* {result.line.name}: {note}" for result in found for note in result.notes]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join([*table, "", *notes]) + "\n")
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADS, *rows])
    print("\n".join([*table, *notes]))
    print(f"\n{folder / 'table.md'}")


def _per_cent(count: int, of: int) -> str:
    return "" if not of else f"{100 * count / of:.1f} %"


def _span(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _goal(goal: float | None, rate: Interval | None) -> str:
    if goal is None or rate is None:
        return ""
    return f"{100 * goal:.0f} %: {'met' if rate.high >= goal else 'MISSED'}"


def _mean(values: torch.Tensor, digits: int) -> str:
    return f"{values.double().mean():,.{digits}f}" if len(values) else ""


def _median(values: torch.Tensor) -> str:
    return f"{values.double().quantile(0.5):,.0f}" if len(values) else ""


if __name__ == "__main__":
    main()
