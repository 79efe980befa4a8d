"""From the query-limited attack to NAttack, one change at a time (Li et al. 2019, table 2).

    python -m lit_adv.experiments.ladder --checkpoint checkpoints/model_a_narrow.ckpt --images 100 --budget 20000

Every rung has the same number of queries, step size, sigma and directions, all printed. Beside the rungs: the
query-limited attack with its authors' sigma, and NAttack with the released loss. With ``--scale 50`` NAttack attacks
the network with its logits multiplied as well, where the released loss sees nothing any more and the paper's does.

Differences from the paper's table: every image asked about is a candidate, on all rungs (the paper looks at the current
image alone), and the number of queries is the limit, not that of steps. Broken off, the same command goes on where it
stopped. One table is printed and written (Markdown, CSV); reports of all attacks lie beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_adv.attack import Attack
from lit_adv.attacks import PGD, NAttack
from lit_adv.datamodules import CIFAR10, MNIST, Digits, ImageDataModule
from lit_adv.estimators import NES
from lit_adv.evaluation import evaluate
from lit_adv.losses import cross_entropy, hinge
from lit_adv.metrics.summary import McNemar, Summary, mcnemar, summarize
from lit_adv.outcome import Outcome
from lit_adv.protocol import Protocol
from lit_adv.tables import csv_bytes, interval, p_value, percent
from lit_adv.tasks import Checkpoint
from lit_adv.threat import ThreatModel

DATA: dict[str, Callable[..., ImageDataModule]] = {"mnist": MNIST, "digits": Digits, "cifar10": CIFAR10}
RELEASED = "NATTACK, released loss"
CHANGES = {
    "QL": "sign steps along NES estimates, halved where the loss has stopped rising",
    "+CLIP": "the probes are clipped into ball and box",
    "+loss": "the hinge of the margin instead of the cross-entropy",
    "-PGD": "the mean moves by the estimate itself and is not clipped",
    "+tanh": "the mean lives in arctanh space",
    "+zscore": "the rewards of a step are normalised",
    "NATTACK": "no antithetic pairs: half the queries a step",
    "QL+tanh+CLIP": "QL with these two changes alone",
    "QL, its own sigma": "QL with sigma 0.001",
    RELEASED: "NATTACK with the loss of the released code",
}  # by rung, what differs from the rung above


@dataclass(frozen=True)
class Setting:
    """What all rungs share.

    Args:
        threat: norm, radius and box. budget: queries per image.
        directions: N; samples of NAttack's population, half the probes of an antithetic estimate.
        step_size: eta. sigma: standard deviation of the probes. shrink: see NAttack.
    """

    threat: ThreatModel
    budget: int = 20_000
    directions: int = 100
    step_size: float = 0.02
    sigma: float = 0.1
    shrink: float = 0.1

    def __str__(self) -> str:
        return (
            f"eta {self.step_size:g}, sigma {self.sigma:g}, N {self.directions} and {self.budget:,} queries an image "
            f"everywhere; {self.threat.norm} {self.threat.radius:g}, shrink {self.shrink:g}"
        )


@dataclass(frozen=True)
class Line:
    """A line of the table: an attack's figures, and its test against the line above it."""

    name: str
    change: str
    queries: int
    summary: Summary
    test: McNemar | None

    def cells(self) -> dict[str, str]:
        """Its cells as they are printed, by their heads."""
        s = self.summary
        median = "" if s.median_first_hit is None else f"{s.median_first_hit:,.0f}"
        return {
            "attack": self.name,
            "queries a step": f"{self.queries:,}",
            "success, %": percent(s.success_rate),
            "95 % interval": interval(s.success_interval),
            "median queries": median,
            "p": "" if self.test is None else p_value(self.test.p),
            "change": self.change,
        }


class Scaled(nn.Module):
    """A network whose logits are multiplied: the same decisions, surer of themselves."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits * self.scale


def rungs(setting: Setting) -> dict[str, Attack]:
    """All attacks of the table, by name, each as far as the budget goes."""
    n, eta, sigma = setting.directions, setting.step_size, setting.sigma
    estimates, populations = -(-setting.budget // (2 * n)), -(-setting.budget // n)
    nes = NES(2 * n, sigma)
    clipped = replace(nes, clip="ball")
    ql = partial(PGD, setting.threat, estimates, eta, random_start=False, plateau=5)
    mean = partial(
        NAttack, setting.threat, step_size=eta, sigma=sigma, init_std=0.0, shrink=setting.shrink, latent=1024
    )
    pairs = partial(mean, estimates, 2 * n, zscore=False, antithetic=True)
    return {
        "QL": ql(estimator=nes, loss=cross_entropy),
        "+CLIP": ql(estimator=clipped, loss=cross_entropy),
        "+loss": ql(estimator=clipped, loss=hinge),
        "-PGD": pairs(space="pixel"),
        "+tanh": pairs(),
        "+zscore": pairs(zscore=True),
        "NATTACK": mean(populations, n),
        "QL+tanh+CLIP": pairs(sign_step=True, loss=cross_entropy),
        "QL, its own sigma": ql(estimator=replace(nes, sigma=1e-3), loss=cross_entropy),
        RELEASED: mean(populations, n, loss="released"),
    }


def climb(
    model: nn.Module,
    data: ImageDataModule,
    setting: Setting,
    folder: Path | None = None,
    scale: float = 1.0,
    images: int | None = None,
) -> list[Line]:
    """Attack with all rungs, and with NAttack's two losses where the logits are multiplied by ``scale``."""
    attacks = rungs(setting)
    lines = _lines(_tried(model, data, attacks, setting, folder, images), setting)
    if scale != 1:
        chosen = {name: attacks[name] for name in ("NATTACK", RELEASED)}
        place = None if folder is None else folder / f"scale_{scale:g}"
        surer = _tried(Scaled(model, scale).eval(), data, chosen, setting, place, images)
        lines += [
            replace(line, name=f"{line.name}, logits x {scale:g}", change="the same decisions, surer of themselves")
            for line in _lines(surer, setting)
        ]
    return lines


def _tried(
    model: nn.Module,
    data: ImageDataModule,
    attacks: dict[str, Attack],
    setting: Setting,
    folder: Path | None,
    images: int | None,
) -> dict[str, Outcome]:
    protocols = [Protocol(name=_slug(name), attack=attack, budget=setting.budget) for name, attack in attacks.items()]
    report = evaluate(model, data, protocols, dirpath=folder, max_samples=images, progress=sys.stderr.isatty())
    return dict(zip(attacks, report.outcomes, strict=True))


def _lines(outcomes: dict[str, Outcome], setting: Setting) -> list[Line]:
    lines: list[Line] = []
    previous: Outcome | None = None
    for name, outcome in outcomes.items():
        against = outcomes["NATTACK"] if name == RELEASED else outcomes.get("QL") if name.startswith("QL") else previous
        test = None if against is None or against is outcome else mcnemar(against.records, outcome.records)
        single = name in ("NATTACK", RELEASED)
        queries = setting.directions * (1 if single else 2)
        lines.append(Line(name, CHANGES[name], queries, summarize(outcome.records), test))
        previous = outcome
    return lines


def _slug(name: str) -> str:
    plain = name.lower().replace(", ", "_").replace(" ", "_")
    return plain.replace("+", "plus_" if plain.startswith("+") else "_").replace("-", "minus_")


def written(lines: Sequence[Line], remarks: Sequence[str], folder: Path) -> list[Path]:
    """Write the table as Markdown and CSV."""
    rows = [line.cells() for line in lines]
    heads = list(rows[0])
    marks = ["---" if head in ("attack", "change") else "---:" for head in heads]
    table = [heads, marks, *([row[head] for head in heads] for row in rows)]
    text = "".join("| " + " | ".join(cells) + " |\n" for cells in table)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "ladder.md", folder / "ladder.csv"]
    paths[0].write_text("".join(f"{remark}\n\n" for remark in remarks) + text)
    paths[1].write_bytes(csv_bytes(rows, heads))
    return paths


def show(lines: Sequence[Line], remarks: Sequence[str]) -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(140, Console().width))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for head in lines[0].cells():
        table.add_column(head, justify="left" if head in ("attack", "change") else "right")
    for line in lines:
        table.add_row(*line.cells().values())
    for remark in remarks:
        console.print(remark, highlight=False)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ladder on a checkpoint."""
    parser = argparse.ArgumentParser(description="From the query-limited attack to NAttack, one change at a time.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="network to attack")
    parser.add_argument("--data", choices=tuple(DATA), default="mnist")
    parser.add_argument("--images", type=int, default=100, help="test images, those wrong at first included")
    parser.add_argument("--budget", type=int, default=20_000, help="queries per image")
    parser.add_argument("--eps", default="0.3", help="radius in linf, e.g. 0.3 or 8/255")
    parser.add_argument("--directions", type=int, default=100, help="N: NAttack's samples, half an estimate's probes")
    parser.add_argument("--step_size", type=float, default=0.02, help="eta; the paper's, for CIFAR-10: 0.008")
    parser.add_argument("--sigma", type=float, default=0.1, help="of the probes")
    parser.add_argument("--shrink", type=float, default=0.1, help="of arctanh space; the paper's, for CIFAR-10: 1e-6")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the logits for the released loss, e.g. 50")
    parser.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="where records and tables go")
    given = parser.parse_args(arguments)
    setting = Setting(
        ThreatModel("linf", given.eps), given.budget, given.directions, given.step_size, given.sigma, given.shrink
    )
    model = Checkpoint(given.checkpoint)
    data = DATA[given.data](batch_size=64, max_test=given.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = climb(model.to(device), data, setting, given.folder, given.scale)
    summary = lines[0].summary
    remarks = [
        f"{given.checkpoint} on {given.data}: {summary.attacked} of {summary.images} images are right at first",
        f"{setting}",
        "p: McNemar's exact test against the line above; variants of QL against QL, the released loss against NATTACK",
    ]
    show(lines, remarks)
    for path in written(lines, remarks, given.folder):
        print(path)


if __name__ == "__main__":
    main()
