"""How far minimal attacks move an image, on thermometer codes and on a plain net: table 3 of NATTACK, on MNIST.

    python -m lit_adv.experiments.distortions --images 50

Carlini & Wagner along the code's own gradient (0: it fails) and through the ramps; ZOO, whose differences of 1e-4 no
code shows; NAttack in linf 0.3, which stops at its first success; *NAttack, which goes on to the nearest it finds. The
plain net is the same Model A without codes. What is missing is trained (checkpoints ``therm``, ``plain_narrow``);
broken off, the same command goes on where it stopped. Distances are total l2 norms, means over successes.

The paper's figures are of CIFAR-10 and networks of its own: Li et al. 2019 (NATTACK), table 3.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lit_adv.archive import weights_hash
from lit_adv.datamodules import MNIST, Batch
from lit_adv.experiments.catalogue import command_line, protocol_of
from lit_adv.experiments.page import Page, told
from lit_adv.experiments.trained import trained
from lit_adv.metrics import Records
from lit_adv.metrics.summary import wilson
from lit_adv.protocol import Protocol
from lit_adv.tables import interval, percent
from lit_adv.tasks import Checkpoint
from lit_adv.trial import Trial

MODELS = {"therm": "mnist_therm", "plain_narrow": "mnist_standard_narrow"}
SHOWN = {"therm": "Therm", "plain_narrow": "plain"}


@dataclass(frozen=True)
class Line:
    """An attack of the table.

    Args:
        name: in the table. config: file of the attack. paper: mean l2 of the paper, by model.
        surrogate: what gradients go through; None: the model's own. few: it is tried on the images of ``--zoo`` alone.
        models: on which it is tried.
    """

    name: str
    config: str
    paper: Mapping[str, str]
    surrogate: str | None = None
    few: bool = False
    models: Sequence[str] = tuple(MODELS)


CW, ZOO = "carlini_wagner_small_l2_mnist", "zoo_l2_mnist"
LINES = (
    Line("cw_no_surrogate", CW, {"therm": "fails"}, "hard", models=("therm",)),
    Line("cw", CW, {"plain_narrow": "0.17"}),
    Line("cw_wide_ramp", CW, {}, "wide", models=("therm",)),
    Line("zoo", ZOO, {"therm": "0.8868", "plain_narrow": "0.19"}, few=True),
    Line("nattack", "nattack_linf_mnist", {"therm": "0.35", "plain_narrow": "0.33"}),
    Line("star_nattack", "star_nattack_l2_mnist", {"therm": "0.26", "plain_narrow": "0.25"}),
)
HEADS = (
    "model", "attack", "images", "success", "95 % interval", "mean L2 of successes", "median L2 of successes",
    "paper: mean L2 (CIFAR-10)", "mean queries of attacked", "mean L2 where all succeed",
)  # fmt: skip
NOTES = (
    "Success: of images right at first, verified by a second pass; L2: total norm, over successes.",
    "cw_no_surrogate follows the code's own gradient, exactly 0; cw on Therm goes through the ramps, cw_wide_ramp "
    "through wider ones. nattack is bound by linf 0.3 and stops at its first success; star_nattack has no radius.",
    "As configured, ZOO has one constant and 250 iterations (the paper: 9 and 3,000, MNIST), *NAttack 198 steps of 100 "
    "samples in 3 searches (600 of 300), C&W 4 constants of 200 iterations (9 of 10,000).",
    "Means are over each attack's own successes, other images from line to line; the last column is over the images on "
    "which all lines of the model succeed that succeed at all.",
    "Paper: Li et al. 2019, table 3, CIFAR-10; that of ZOO on Therm stands beside a success of 0.0 % in its table 1.",
)


def main() -> None:
    """Train and attack what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=50, help="test images, from the first on")
    parser.add_argument("--zoo", type=int, default=10, help="test images of ZOO")
    parser.add_argument("--steps", type=int, default=None, help="steps of every attack, fewer than configured: a trial")
    given = command_line(parser, [line.name for line in LINES], list(MODELS), Path("runs/distortions"))
    lines = [line for line in LINES if line.name in given.only]
    data, rows, notes = MNIST(batch_size=128), [], list(NOTES)
    for name in given.models:
        flags = [f"--{flag}" for flag in given.train]
        model = Checkpoint(trained(name, MODELS[name], *flags, folder=given.checkpoints))
        notes.append(f"{SHOWN[name]}: weights {weights_hash(model)[:8]}")
        found: list[tuple[Line, Records]] = []
        for line in lines:
            if name in line.models:
                found.append((line, tried(line, model, data, given.folder / name, given)))
                print(" | ".join(row(name, *found[-1])), flush=True)
        every = [records for _, records in found]
        rows += [[*row(name, line, records), paired(records, every)] for line, records in found]
    settings = {
        "data": f"MNIST, the first {given.images} test images, of ZOO {min(given.images, given.zoo)}",
        "levels": 16,
        "network": "ModelA(filters=(16, 32), hidden=100)",
        "training": " ".join(given.train) or "as configured",
        "steps": given.steps or "as configured",
    }
    page = Page(
        "Distortion of minimal attacks",
        settings,
        HEADS,
        rows,
        [*notes, *(told(protocol(line, given)) for line in lines)],
    )
    files = page.write(given.folder, "distortions")
    print(page)
    print("\n".join(map(str, files)))


def tried(line: Line, model: nn.Module, data: MNIST, folder: Path, given: argparse.Namespace) -> Records:
    """What an attack did to the first images; records of earlier runs are read, not made again."""
    data.prepare_data()
    data.setup("test")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the gradient was exactly 0 or not finite")  # so it is meant
        trial = Trial(protocol(line, given), model, f"{data.name}/test", data.num_classes, folder, progress=True)
        for batch in data.test_dataloader():
            trial.add(Batch(*batch))
            if trial.full:
                break
        return trial.close().unique()


def protocol(line: Line, given: argparse.Namespace) -> Protocol:
    """How a line is tried."""
    images = min(given.images, given.zoo) if line.few else given.images
    steps = {} if given.steps is None else {"iterations" if line.config == CW else "steps": given.steps}
    return protocol_of(line.config, line.name, steps, max_samples=images, surrogate=line.surrogate)


def paired(records: Records, every: Sequence[Records]) -> str:
    """Mean L2 over the images on which all attacks succeed that succeed at all, and their number."""
    broken = [part[part.clean_correct & part.verified] for part in every]
    sets = [set(part.index.tolist()) for part in broken if len(part)]
    shared = set.intersection(*sets) if sets else set()
    own = records[records.clean_correct & records.verified]
    far = [l2 for place, l2 in zip(own.index.tolist(), own.l2.tolist(), strict=True) if place in shared]
    return f"{sum(far) / len(far):.2f} (n {len(far)})" if far else ""


def row(name: str, line: Line, records: Records) -> list[str]:
    """A line of the table."""
    attacked = records[records.clean_correct]
    broken = attacked[attacked.verified]
    far = broken.l2.double()
    return [
        SHOWN[name], line.name, f"{len(attacked)}", percent(len(broken) / len(attacked)) if len(attacked) else "",
        interval(wilson(len(broken), len(attacked))), f"{far.mean():.2f}" if len(far) else "",
        f"{far.quantile(0.5):.2f}" if len(far) else "", line.paper.get(name, ""),
        f"{attacked.queries.double().mean():,.0f}" if len(attacked) else "",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
