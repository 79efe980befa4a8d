"""How fast it is: ``python benchmarks/run.py [--quick] [--threads 1] [--device cpu] [--only PART ...] [--json PATH]``.

Every figure is a ratio to a baseline that was timed in turn with it, in the same run: the passes through the model
that an attack cannot do without, a hand-written training loop, the bare imports.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import limits
import startup
import torch
import training
import white_box
from measure import Comparison, clock_for
from rich.console import Console
from rich.table import Table

from lit_adv.cli import keep_memory

PARTS = ("attacks", "black-box", "white-box", "training", "startup")


def main() -> None:
    """Measure, print the table, write the figures if asked."""
    options = _options()
    keep_memory()  # as train.py and evaluate.py do; the baselines gain by it too
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console()
    found: list[Comparison] = []
    for comparison in _comparisons(options):
        found.append(comparison)
        console.print(f"{comparison.name}: {comparison.ratio:.2f}", style="dim")
    console.print(_table(found, options))
    if options.json is not None:
        options.json.write_text(json.dumps(_record(found, options), indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--quick", action="store_true", help="less of the same: a minute in all")
    parser.add_argument("--threads", type=int, default=1, help="threads of the processor")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where the models run")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--json", type=Path, default=None, help="file for all figures")
    return parser.parse_args()


def _comparisons(options: argparse.Namespace) -> Iterator[Comparison]:
    clock = clock_for(options.device, options.threads)
    repetitions = 3 if options.quick else 5
    if "attacks" in options.only:
        for attack in limits.cases(options.quick):
            yield limits.compare(attack, options.device, repetitions, clock)
    if "black-box" in options.only:
        for attack in limits.black_box_cases(options.quick):
            yield limits.compare(attack, options.device, repetitions, clock)
    if "white-box" in options.only:
        for attack in white_box.cases(options.quick):
            yield white_box.measured(attack, options.device, repetitions, clock)
    if "training" in options.only:
        for case in training.cases(options.quick):
            yield training.compare(case, options.device, repetitions, clock)
    if "startup" in options.only:
        yield startup.compare(1 if options.quick else 3)


def _table(found: list[Comparison], options: argparse.Namespace) -> Table:
    unit = "processor seconds" if options.device.type == "cpu" and options.threads == 1 else "seconds"
    table = Table(
        title=f"{options.device}, {options.threads} thread(s), torch {torch.__version__}",
        caption=f"{unit}, medians; ratio: median of the pairs (least, largest)",
    )
    for heading in ("what", "work"):
        table.add_column(heading)
    for heading in ("baseline", "ours", "ratio", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        ratios, colour = sorted(row.ratios), "green" if row.ratio <= row.goal else "red"
        base, ours = (sorted(times)[len(times) // 2] for times in (row.baseline, row.ours))
        ratio = f"[{colour}]{row.ratio:.2f}[/] ({ratios[0]:.2f}, {ratios[-1]:.2f})"
        table.add_row(row.name, row.work, f"{base:.2f}", f"{ours:.2f}", ratio, f"{row.goal:.2f}")
    return table


def _record(found: list[Comparison], options: argparse.Namespace) -> dict[str, object]:
    return {
        "machine": platform.processor() or platform.machine(),
        "device": str(options.device),
        "threads": options.threads,
        "torch": torch.__version__,
        "quick": options.quick,
        "comparisons": [asdict(row) | {"ratios": row.ratios, "ratio": row.ratio} for row in found],
    }


if __name__ == "__main__":
    main()
