"""Train the reference targets into ``checkpoints/``: what every figure of the other experiments is measured on.

``model_a``: Model A, standard training on MNIST. ``model_a_narrow``: a quarter of its filters, adversarially trained.
``model_b`` and ``model_d``: Models B and D, standard training: local models of transfer attacks.
A target that is there is kept; one whose training was broken off goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lit_adv.cli import train_main
from lit_adv.experiments import trained

TARGETS = {
    "model_a": "mnist_standard",
    "model_a_narrow": "mnist_madry_narrow",
    "model_b": "mnist_standard_b",
    "model_d": "mnist_standard_d",
}


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(TARGETS), help=f"which of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of the results")
    parser.add_argument("--precision", default="32-true", help="of training; bf16-mixed is faster where there is AMX")
    parser.add_argument("--max_train", type=int, default=None, help="training images, to try the command out")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}: choose from {', '.join(TARGETS)}")
    for name in arguments.names:
        target = arguments.checkpoints / f"{name}.ckpt"
        if target.exists():
            print(f"{target} is there")
            continue
        begun = time.perf_counter()
        train_main(command(name, target, arguments.precision, arguments.max_train))
        print(f"{target} after {(time.perf_counter() - begun) / 60:.1f} minutes")


def command(name: str, target: Path, precision: str, max_train: int | None) -> list[str]:
    """Arguments of ``train.py`` that train a target, or go on with it."""
    words = [f"--trainer.precision={precision}"]
    if max_train is not None:
        words.append(f"--data.max_train={max_train}")
    return trained.command(name, TARGETS[name], target, *words)


if __name__ == "__main__":
    main()
