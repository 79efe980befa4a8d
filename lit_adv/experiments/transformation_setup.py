"""What the experiments on adversarial transformation are set up with: data, networks, sizes, the command line.

Every command has two sets of sizes: small ones that end within minutes on two CPU cores (MNIST), and with ``--full``
the paper's; each size is a flag of its own, too.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_adv.cli import keep_memory
from lit_adv.datamodules import CIFAR10, MNIST, CIFAR10Jpeg, ImageDataModule

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NETWORK = "--model.init_args.model"
INNER = "--model.init_args.objective.init_args.attack.init_args"
STEPS = 13  # N of g

Recipe = tuple[str, tuple[str, ...]]
"""How a network is trained: a file of ``configs/train``, and further flags of ``train.py``."""


@dataclass(frozen=True)
class Family:
    """What depends on the data.

    Args:
        module: the data. stem: begins the names of its files in ``configs/train``.
        eps: the attacker's radius, linf. steps, step_size: of white-box attacks.
        transfer: steps and step size on the sources. delta: of g. deltas: of the sweep. pair: of the EOT figure.
        plain, madry: the undefended network and the adversarially trained one. sources: of transferred images.
        on_gpu: some of the configurations ask for a GPU.
    """

    module: Callable[..., ImageDataModule]
    stem: str
    eps: float
    steps: int
    step_size: float
    transfer: tuple[int, float]
    delta: float
    deltas: tuple[float, ...]
    pair: tuple[float, float]
    plain: Recipe
    madry: Recipe
    sources: Mapping[str, Recipe]
    on_gpu: bool = False


def inner(eps: float, steps: int, step_size: float | None = None) -> tuple[str, ...]:
    """Flags that set the attack of adversarial training; the step is 2.5 eps / steps where none is given."""
    step_size = 2.5 * eps / steps if step_size is None else step_size
    return f"{INNER}.threat.eps={eps:g}", f"{INNER}.steps={steps}", f"{INNER}.step_size={step_size:g}"


_VGG19 = "[[64, 64], [128, 128], [256, 256, 256, 256], [512, 512, 512, 512], [512, 512, 512, 512]]"
_OTHER = "--seed_everything=1"
_OBJECTIVE = "--model.init_args.objective.init_args"
_MNIST = Family(
    MNIST, "mnist", 0.1, 50, 0.006, (20, 0.01), 0.3, (0.05, 0.1, 0.2, 0.3, 0.4), (0.1, 0.3),
    ("mnist_standard", ()),
    ("mnist_madry", (*inner(0.1, 10, 0.025), f"{INNER}.random_start=true", f"{_OBJECTIVE}.clean_share=0")),
    {
        "Model A": ("mnist_standard", (_OTHER,)),
        "Model B": ("mnist_standard_b", (_OTHER,)),
        "Model A narrow, adversarial": ("mnist_madry_narrow", (*inner(0.1, 7, 0.033), _OTHER)),
    },
)  # fmt: skip
_CIFAR10 = Family(
    CIFAR10, "cifar10", 0.031, 50, 0.002, (20, 0.003), 0.2, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4), (0.1, 0.2),
    ("cifar10_standard", ()),
    ("cifar10_madry", ()),
    {
        "ResNet-18": ("cifar10_standard", (_OTHER,)),
        "VGG-19-BN": (
            "cifar10_standard",
            (f"{NETWORK}=lit_adv.models.VGG", f"{NETWORK}.init_args.stages={_VGG19}", _OTHER),
        ),
        "ResNet-18, adversarial": ("cifar10_madry", (_OTHER,)),
    },
    on_gpu=True,
)  # fmt: skip
FAMILIES = {"mnist": _MNIST, "cifar10": _CIFAR10, "cifar10_jpeg": replace(_CIFAR10, module=CIFAR10Jpeg)}


class Size(NamedTuple):
    """A flag: its value in a small run, in the paper's, and what it is."""

    small: Any
    paper: Any
    help: str
    kind: Callable[[str], Any] = int


SIZES = {
    "epochs": Size(2, None, "epochs of training; the paper's: as configured"),
    "max_train": Size(5000, None, "training images; the paper's: all"),
    "images": Size(20, 1000, "test images, from the first on"),
    "judges": Size(30, 30, "draws of g by which an image is judged"),
    "steps": Size(20, 50, "steps of white-box attacks, at the paper's total length"),
    "eot": Size(4, 500, "draws of g over which a gradient is averaged"),
}


def command_line(doc: str | None, sizes: Mapping[str, Size], arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags that all commands share, and ``sizes`` of one; one that is not given is small, or the paper's.

    With ``--config`` (a further configuration for every training) epochs and number of training images are its own.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--data", choices=tuple(FAMILIES), default="mnist")
    parser.add_argument("--config", type=Path, default=None, help="further configuration of every training")
    parser.add_argument("--full", action="store_true", help="the paper's sizes wherever no flag gives another")
    parser.add_argument("--precision", default=None, help="of training, e.g. bf16-mixed; default: as configured")
    parser.add_argument("--folder", type=Path, default=Path("runs/transformation"), help="records, tables, figures")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of the networks")
    parser.add_argument("--threads", type=int, default=None, help="threads of the processor; default: torch's own")
    every = {**SIZES, **sizes}
    for name, size in every.items():
        several = "+" if isinstance(size.small, tuple) else None
        text = f"{size.help} ({_shown(size.small)}; --full: {_shown(size.paper)})"
        parser.add_argument(f"--{name}", type=size.kind, nargs=several, default=None, help=text)
    given = parser.parse_args(arguments)
    if given.config is not None and not given.config.is_file():
        parser.error(f"--config {given.config}: there is no such file")
    training = ("epochs", "max_train")
    words = [f"{getattr(given, name)}_{name}" for name in training if getattr(given, name) is not None]
    if given.config is None and not given.full:
        words = [f"{getattr(given, name) or every[name].small}_{name}" for name in training]
    if given.config is not None:  # by its content, too: weights of another one must not be taken for its own
        words.insert(0, f"{given.config.stem}_{hashlib.sha256(given.config.read_bytes()).hexdigest()[:6]}")
    given.tag = "_".join(words)
    for name, size in every.items():
        if getattr(given, name) is None and not (given.config is not None and name in training):
            setattr(given, name, size.paper if given.full else size.small)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    keep_memory()
    return given


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "as configured" if value is None else f"{value}"
