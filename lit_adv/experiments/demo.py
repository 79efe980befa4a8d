"""The main job on the embedded digits: train a plain and a defended classifier, attack both, report.

Both are attacked while they are trained (TensorBoard: ``runs/``). Then white-box PGD and black-box NAttack attack both
on test images; one table is printed and one report written.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from lit_adv.audit import Audited
from lit_adv.cli import EvaluateCLI, quiet, train_main
from lit_adv.report import Outcome, Report

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
MODELS = {"plain": "digits_standard", "robust": "digits_madry"}


def main() -> None:
    """Run the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where logs, weights and report go")
    parser.add_argument("--images", type=int, default=200, help="test images to attack")
    parser.add_argument("--epochs", type=int, default=None, help="epochs of training; default: the configurations'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # on networks this small a second thread only gets in the way of the first
    begun = time.perf_counter()
    report = demo(arguments.folder, arguments.images, arguments.epochs)
    report.show()
    paths = report.write(arguments.folder / "report")
    print(f"\n{time.perf_counter() - begun:.0f} s. The report: {paths['html']}")
    print(f"The training: tensorboard --logdir {arguments.folder}")


def demo(folder: Path, images: int = 200, epochs: int | None = None) -> Report:
    """Train and attack both classifiers.

    Args:
        folder: for logs, weights and records. images: test images to attack. epochs: of training.
    """
    outcomes: list[Outcome] = []
    probed: list[Audited] = []
    facts: dict[str, str] = {}
    for model, config in MODELS.items():
        weights = folder / f"{config}.ckpt"
        print(f"training the {model} classifier ({config}), attacked by PGD and NAttack on the way", flush=True)
        train(config, weights, folder, epochs)
        print(f"attacking the {model} classifier", flush=True)
        report = attack(config, weights, folder, images)
        outcomes += [replace(outcome, model=model) for outcome in report.outcomes]
        probed += [replace(audit, model=model) for audit in report.probed]
        facts |= {f"{model}, {name}" if " " in name else name: fact for name, fact in report.facts.items()}
    return Report(outcomes, "plain and adversarially trained classifier", "digits", facts, probed)


def train(config: str, weights: Path, folder: Path, epochs: int | None) -> None:
    """Train one classifier with probes."""
    words = ["fit", "--config", str(CONFIGS / "train" / f"{config}.yaml")]
    for probe in ("pgd10_digits", "nattack_digits"):
        words += ["--config", str(CONFIGS / "probe" / f"{probe}.yaml")]
    words += ["--save_as", str(weights), f"--trainer.default_root_dir={folder}", "--trainer.enable_model_summary=false"]
    train_main([*words, *([] if epochs is None else [f"--epochs={epochs}"])])


def attack(config: str, weights: Path, folder: Path, images: int) -> Report:
    """Attack one classifier on test images."""
    words = ["--config", str(CONFIGS / "evaluate" / "digits.yaml"), f"--model.checkpoint={weights}"]
    words += [f"--trainer.default_root_dir={folder}", f"--name=attacks_{config}", f"--data.max_test={images}"]
    with quiet():
        report = EvaluateCLI(words).attack()
    assert report is not None  # the demo runs in one process
    return report


if __name__ == "__main__":
    main()
