"""Three defences that only seem to be some, and what tells them apart.

    python -m lit_adv.experiments.masking --checkpoint checkpoints/model_a.ckpt

Of the same classifier: one behind a rounding of its pixels that offers no backward pass, so that its gradient is zero;
one whose gradient is scaled by 1e-12, its values untouched; one behind fresh noise. The first two are attacked by PGD
and Carlini & Wagner through the gradients they offer, by Square and NAttack from their scores, and through the
classifier inside (BPDA with the identity), with the audit's findings. The third is attacked by PGD along single draws
and along the mean of 20 (EOT), both judged by 30 fresh decisions and compared image by image.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_adv.attacks import PGD, CarliniWagner, NAttack, Square
from lit_adv.cli import keep_memory
from lit_adv.datamodules import MNIST
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.estimators import Autograd
from lit_adv.evaluation import evaluate
from lit_adv.metrics.summary import mcnemar
from lit_adv.protocol import Protocol
from lit_adv.report import Report
from lit_adv.tables import interval, p_value, percent
from lit_adv.tasks import Checkpoint
from lit_adv.threat import ThreatModel


class Rounded(Defense):
    """A classifier behind a rounding of its pixels, with no backward pass of its own: the gradient is zero.

    Args:
        classifier: images to logits. num_classes: of it.
        levels: steps of the rounding in [0, 1].
    """

    def __init__(self, classifier: nn.Module, num_classes: int = 10, levels: int = 8) -> None:
        super().__init__()
        self.classifier, self.num_classes, self.levels = classifier, num_classes, levels

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier((x * self.levels).round() / self.levels)
        return logits


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 1e-12


class Faint(Defense):
    """A classifier whose gradient is scaled by 1e-12, its values untouched.

    Args:
        classifier: images to logits. num_classes: of it.
    """

    def __init__(self, classifier: nn.Module, num_classes: int = 10) -> None:
        super().__init__()
        self.classifier, self.num_classes = classifier, num_classes

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(_Scaled.apply(x))
        return logits


class Jittered(Defense):
    """A classifier behind fresh Gaussian noise.

    Args:
        classifier: images to logits. num_classes: of it.
        noise: its standard deviation, pixel units.
    """

    stochastic = True

    def __init__(self, classifier: nn.Module, num_classes: int = 10, noise: float = 0.4) -> None:
        super().__init__()
        self.classifier, self.num_classes, self.noise = classifier, num_classes, noise

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        noise = torch.randn_like(x) if draws is None else draws.normal(*x.shape[1:], dtype=x.dtype)
        logits: Tensor = self.classifier(x + self.noise * noise)
        return logits


def masked(threat: ThreatModel, budget: int = 3_000) -> list[Protocol]:
    """What deterministic defences are attacked with: by their gradients, by their scores, by what lies inside."""
    pgd = PGD(threat, steps=40, step_size=threat.radius / 30, random_start=False)
    population = NAttack(threat, steps=budget // 100, samples=100, step_size=0.02, shrink=0.1)
    return [
        Protocol(name="pgd", attack=pgd),
        Protocol(name="carlini_wagner", attack=CarliniWagner(ThreatModel("l2", "inf"), 100, 5, 0.05, 0.1)),
        Protocol(name="square", attack=Square(threat, steps=budget), budget=budget),
        Protocol(name="nattack", attack=population, budget=budget),
        Protocol(name="pgd_inside", attack=pgd, surrogate="classifier"),
    ]


def averaged(threat: ThreatModel, steps: int = 10, eot: int = 20) -> list[Protocol]:
    """PGD along single draws, and along the mean of several."""
    plain = PGD(threat, steps, 2.5 * threat.radius / steps, False, estimator=Autograd(1), stop_at_hit=False)
    mean = PGD(threat, steps, 2.5 * threat.radius / steps, False, estimator=Autograd(eot), stop_at_hit=False)
    return [Protocol(name="pgd", attack=plain), Protocol(name=f"pgd_eot{eot}", attack=mean)]


def compared(report: Report) -> str:
    """Verified success of both attacks, and McNemar's test on the same images."""
    first, second = report.outcomes
    test = mcnemar(first.records, second.records)
    shares = [
        f"{o.name} {percent(s.success_rate)} % {interval(s.success_interval)}"
        for o, s in zip(report.outcomes, report.summaries, strict=True)
    ]
    return (
        f"verified success: {shares[0]}, {shares[1]}; broken by the first alone {test.b}, by the second alone "
        f"{test.c} of {test.n}, McNemar's p {p_value(test.p)}"
    )


def main() -> None:
    """Attack all three, print what is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/model_a.ckpt"), help="the classifier")
    parser.add_argument("--data", type=Path, default=None, help="folder of MNIST")
    parser.add_argument("--folder", type=Path, default=Path("runs/masking"), help="records and reports")
    parser.add_argument("--images", type=int, default=200, help="test images of the random defence")
    parser.add_argument("--few", type=int, default=50, help="test images of the other two")
    parser.add_argument("--eps", type=float, default=0.3, help="radius, linf")
    parser.add_argument("--random_eps", type=float, default=0.08, help="radius for the random defence, linf")
    parser.add_argument("--noise", type=float, default=0.4, help="of the random defence")
    parser.add_argument("--only", nargs="+", default=["rounded", "faint", "jittered"], help="defences to attack")
    parser.add_argument("--threads", type=int, default=1, help="threads of the processor")
    given = parser.parse_args()
    keep_memory()
    torch.set_num_threads(given.threads)
    classifier = Checkpoint(given.checkpoint)
    data = MNIST() if given.data is None else MNIST(given.data)
    defences: Mapping[str, Defense] = {"rounded": Rounded(classifier), "faint": Faint(classifier)}
    for name, defence in defences.items():
        if name in given.only:
            report = evaluate(
                defence.eval(), data, masked(ThreatModel("linf", given.eps)), dirpath=given.folder / name,
                max_samples=given.few, name=name,
            )  # fmt: skip
            report.show()
    if "jittered" in given.only:
        protocols = [replace(p, max_samples=given.images) for p in averaged(ThreatModel("linf", given.random_eps))]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*with eot=1 follows the gradient of one draw")  # so it is meant
            report = evaluate(
                Jittered(classifier, noise=given.noise).eval(), data, protocols, dirpath=given.folder / "jittered",
                name="jittered",
            )  # fmt: skip
        report.show()
        print(compared(report))


if __name__ == "__main__":
    main()
