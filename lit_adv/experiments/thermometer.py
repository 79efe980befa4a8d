"""Thermometer codes on MNIST: without their surrogate no gradient attack gets anywhere, with it all images break.

    python -m lit_adv.experiments.thermometer --images 100

Trains the narrow Model A behind codes of 16 levels if the checkpoints ``therm`` and ``therm_adv`` are missing: on clean
images, and on the images of LS-PGA at eps 0.3. Both are measured on the whole test set, then attacked at linf 0.3: PGD
along the code's own gradient, which is 0; PGD through the ramps (BPDA), those of the paper and wider ones; LS-PGA;
NAttack with 20,000 queries. Below stands the worst case image by image. The reports with the audit lie beside the
table; broken off, the same command goes on where it stopped. A goal is met where the
rate itself meets it.

The paper's figures are of CIFAR-10 at linf 0.031 and a wide residual network: Li et al. 2019 (NATTACK), table 1.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lit_adv.archive import weights_hash
from lit_adv.datamodules import MNIST, Batch
from lit_adv.evaluation import evaluate
from lit_adv.experiments.catalogue import command_line, protocol_of
from lit_adv.experiments.page import Curve, Page, figure, told
from lit_adv.experiments.trained import trained
from lit_adv.metrics import Records
from lit_adv.metrics.summary import queries_curve, wilson, worst_case
from lit_adv.protocol import Protocol
from lit_adv.report import Report
from lit_adv.tables import interval, percent
from lit_adv.tasks import Checkpoint

CONFIGS = {"therm": "mnist_therm", "therm_adv": "mnist_therm_adv"}
SHOWN = {"therm": "Therm", "therm_adv": "Therm-Adv"}


@dataclass(frozen=True)
class Line:
    """An attack of the table.

    Args:
        name: in the table. config: file of the attack. surrogate: what gradients go through; None: the ramps.
        goals: what is expected of the success rate, by model: "0" or a least share.
        paper: success in per cent, by model.
    """

    name: str
    config: str
    surrogate: str | None = None
    goals: Mapping[str, float] | None = None
    paper: Mapping[str, str] | None = None

    def protocol(self, images: int, budget: int) -> Protocol:
        """How it is tried; black-box attacks within a budget."""
        found = protocol_of(self.config, self.name, max_samples=images, surrogate=self.surrogate)
        if found.budget is None:
            return found
        return protocol_of(self.config, self.name, max_samples=images, budget=min(budget, found.budget))


LINES = (
    Line("pgd_no_surrogate", "pgd_linf_mnist", "hard", {"therm": 0.0}),
    Line("pgd_ramp", "pgd_linf_mnist", None, {"therm": 0.95}, {"therm": "100.0 (BPDA)", "therm_adv": "76.1 (BPDA)"}),
    Line("pgd_wide_ramp", "pgd_linf_mnist", "wide"),
    Line("pgd_wide_ramp_restarts", "pgd_restarts_linf_mnist", "wide"),
    Line("ls_pga", "ls_pga_linf_mnist", None, {"therm": 0.95}),
    Line("nattack", "nattack_linf_mnist", None, {"therm": 0.95}, {"therm": "100.0", "therm_adv": "91.2"}),
)
CLEAN = {"therm": (0.97, "92.8"), "therm_adv": (0.95, "88.5")}
"""Clean accuracy that is the goal, and the paper's in per cent."""

HEADS = (
    "model", "attack", "images", "clean accuracy or success", "95 % interval", "goal", "paper (CIFAR-10, 0.031)",
    "mean queries of attacked", "mean L2 of successes",
)  # fmt: skip


def main() -> None:
    """Train and attack what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=100, help="test images, from the first on")
    parser.add_argument("--budget", type=int, default=20_000, help="queries per image of NAttack")
    parser.add_argument("--audit", type=int, default=64, help="images of the audit; 0: none")
    given = command_line(parser, [line.name for line in LINES], list(CONFIGS), Path("runs/thermometer"))
    lines = [line for line in LINES if line.name in given.only]
    data = MNIST(batch_size=256)
    rows, notes, curves = [], [], []
    for name in given.models:
        flags = [f"--{flag}" for flag in given.train]
        model = Checkpoint(trained(name, CONFIGS[name], *flags, folder=given.checkpoints))
        rows.append(clean_row(name, model, data))
        report = attacked(name, model, data, lines, given)
        found = {outcome.name: outcome.records for outcome in report.outcomes}
        rows += [row(name, line, found[line.name]) for line in lines]
        rows.append(row(name, None, worst_case(list(found.values()))))
        notes.append(f"{SHOWN[name]}: weights {weights_hash(model)[:8]}")
        notes += [f"audit: {warning}" for warning in report.warnings()]
        notes += [audit.summary for audit in report.audits]
        if "nattack" in found:
            x, y = queries_curve(found["nattack"])
            curves.append(Curve(SHOWN[name], x.tolist(), (100 * y).tolist()))
    write(rows, [*notes, *(told(line.protocol(given.images, given.budget)) for line in lines)], curves, given)


def attacked(name: str, model: nn.Module, data: MNIST, lines: Sequence[Line], given: argparse.Namespace) -> Report:
    """The report on one model; records of earlier runs are read, not made again."""
    protocols = [line.protocol(given.images, given.budget) for line in lines]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the gradient was exactly 0 or not finite")  # so it is meant
        report = evaluate(
            model, data, protocols, dirpath=given.folder / name, max_samples=given.images, name=SHOWN[name],
            progress=True, audit=given.audit,
        )  # fmt: skip
    report.show()
    return report


def clean_row(name: str, model: nn.Module, data: MNIST) -> list[str]:
    """Clean accuracy on the whole test set."""
    data.prepare_data()
    data.setup("test")
    right = images = 0
    with torch.no_grad():
        for image, label, _ in (Batch(*batch) for batch in data.test_dataloader()):
            right, images = right + int((model(image).argmax(1) == label).sum()), images + len(label)
    least, paper = CLEAN[name]
    ends = wilson(right, images)
    assert ends is not None
    goal = f"at least {percent(least)}: {_verdict(right / images >= least, ends.high >= least)}"
    return [
        SHOWN[name],
        "none (whole test set)",
        f"{images}",
        percent(right / images),
        interval(ends),
        goal,
        paper,
        "",
        "",
    ]


def _verdict(met: bool, near: bool) -> str:
    return "met" if met else "missed, but the interval reaches it" if near else "MISSED"


def row(name: str, line: Line | None, records: Records) -> list[str]:
    """A line of the table; None: the worst case."""
    attacked = records[records.clean_correct]
    broken = attacked[attacked.verified]
    ends = wilson(len(broken), len(attacked))
    goal = ""
    least = None if line is None else (line.goals or {}).get(name)
    if least is not None and ends is not None:
        rate = len(broken) / len(attacked)
        met, near = (rate >= least, ends.high >= least) if least else (rate <= 0.05, ends.low <= 0.05)
        goal = f"{'at least ' + percent(least) if least else 'at most 5'}: {_verdict(met, near)}"
    return [
        SHOWN[name], "worst case per image" if line is None else line.name, f"{len(attacked)}",
        percent(len(broken) / len(attacked)) if len(attacked) else "", interval(ends), goal,
        "" if line is None else (line.paper or {}).get(name, ""),
        "" if line is None else _mean(attacked.queries, 0), _mean(broken.l2, 2),
    ]  # fmt: skip


def write(
    rows: Sequence[Sequence[str]], notes: Sequence[str], curves: Sequence[Curve], given: argparse.Namespace
) -> None:
    """The table with what belongs to it, printed and written, and the figure."""
    settings = {
        "data": f"MNIST, the first {given.images} test images", "norm": "linf 0.3", "levels": 16,
        "network": "ModelA(filters=(16, 32), hidden=100)", "training": " ".join(given.train) or "as configured",
        "queries": f"{given.budget:,}",
    }  # fmt: skip
    fixed = (
        "Success: of images right at first, verified by a second pass; the worst case counts an image that any attack "
        "broke. pgd_no_surrogate follows the code's own gradient, exactly 0 (random starts may still hit).",
        "Paper: Li et al. 2019, table 1, CIFAR-10 at linf 0.031 with a wide residual network: no figure of MNIST.",
    )
    page = Page("Thermometer encoding", settings, HEADS, rows, [*fixed, *notes])
    files = page.write(given.folder, "thermometer")
    if curves:
        files.append(figure(given.folder / "thermometer.png", curves, "queries", "success of NAttack, %"))
    print(page)
    print("\n".join(map(str, files)))


def _mean(values: torch.Tensor, digits: int) -> str:
    return f"{values.double().mean():,.{digits}f}" if len(values) else ""


if __name__ == "__main__":
    main()
