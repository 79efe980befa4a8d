"""NAttack with and without the regression network that says where to begin (Li et al. 2019, table 4).

    python -m lit_adv.experiments.nattack_r --checkpoint checkpoints/therm.ckpt --images 250 --pairs 1000

Four parts, each of which goes on where it was broken off: NAttack breaks training images and its means are kept; a
network S is trained to answer them; a factor of its answers is chosen on further training images; test images are
attacked from S and from noise of three sizes, with equal seeds and population. One table and one figure are written.
The first part can be shared: with ``--only_pairs`` and RANK and WORLD_SIZE set each process makes its share.

The goal is that the mean of the queries to success falls by a fifth against the usual start, init_std 0.001, over the
images that both break. Departures from the paper: its S is a segmentation network and its target Inception V3 behind
random resizing; the mean is tested at every step by default (the release: every tenth), one query each, so that
queries can be told apart; pairs are made with antithetic populations and a larger step than the attack's, for S learns
their mean and not their noise; and S is tried with a factor as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lit_adv.archive import configuration, weights_hash
from lit_adv.attacks import NAttack
from lit_adv.cli import keep_memory
from lit_adv.datamodules import CIFAR10, MNIST, CIFAR10Jpeg, Digits, ImageDataModule, PerturbationPairs
from lit_adv.datamodules.pairs import NOTE, TARGET_SCALE
from lit_adv.experiments.nattack_r_table import HEADS, USUAL, Found, goals, rows
from lit_adv.experiments.page import Curve, Page, figure
from lit_adv.experiments.trained import trained
from lit_adv.metrics import queries_curve
from lit_adv.oracle import QueryOracle
from lit_adv.pairs import Made, make_pairs
from lit_adv.protocol import Protocol
from lit_adv.tasks import Checkpoint
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial
from lit_adv.verify import correct

DATA: dict[str, tuple[Callable[..., ImageDataModule], str]] = {
    "mnist": (MNIST, "nattack_r_mnist"),
    "digits": (Digits, "nattack_r_mnist"),
    "cifar10": (CIFAR10, "nattack_r_cifar10"),
    "cifar10_jpeg": (CIFAR10Jpeg, "nattack_r_cifar10"),
}  # by name, the data and the training of S
FACTORS = (1.0, 3.0, 10.0, 30.0, 100.0)
STARTS = (0.001, 0.1, 1.0)


class Same(nn.Module):
    """Answers one and the same mean for every image: what S is worth beyond it lies in looking at the image.

    Args:
        answer: (C, h, w).
    """

    answer: torch.Tensor

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("answer", answer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer.expand(len(x), *self.answer.shape)


class Experiment:
    """The four parts, with what they share.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.folder = given, Path(given.folder)
        rank = int(os.environ.get("RANK", 0))
        gpus = torch.cuda.device_count()
        self.device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
        self.model = Checkpoint(given.checkpoint).to(self.device)
        make, self.training = DATA[given.data]
        self.data = make(batch_size=64, max_test=given.images)
        self.data.prepare_data()
        self.attack = partial(
            NAttack, ThreatModel("linf", given.eps), step_size=given.step_size, samples=given.samples,
            steps=-(-given.budget // given.samples), shrink=given.shrink, schedule=given.schedule,
            check_every=given.check_every, init_std=STARTS[0],
        )  # fmt: skip
        # of this number alone, so that none of the images on which the factor is chosen are among them
        self.pair_folder = self.folder / f"pairs_{given.pairs}"

    def pairs(self) -> Made:
        """Attack training images and keep the means."""
        given = self.given
        attack = self.attack(
            samples=given.pair_samples, step_size=given.pair_step_size, antithetic=True, init_std=0.0, schedule="mean",
            check_every=1, steps=given.pair_steps,
        )  # fmt: skip
        return make_pairs(attack, self.model, self.data, self.pair_folder, given.pairs, progress=True)

    def regression(self) -> nn.Module:
        """The network S, trained if it is missing."""
        given = self.given
        learns = json.dumps([given.target, given.epochs, *(given.train or ())]).encode()
        made_with = hashlib.sha256((self.pair_folder / NOTE).read_bytes() + learns).hexdigest()[:6]
        name = f"nattack_r_{Path(given.checkpoint).stem}_{given.pairs}_{made_with}"
        flags = [f"--data.folder={self.pair_folder}", f"--data.target={given.target}", f"--epochs={given.epochs}"]
        path = trained(name, self.training, *flags, *(given.train or ()), folder=Path(given.checkpoints))
        return Checkpoint(path).to(self.device)

    def errors(self, network: nn.Module) -> tuple[float, float, int]:
        """Mean squared errors of S and of the answer 0 on the pairs held out, and their number."""
        pairs = PerturbationPairs(self.pair_folder, target=self.given.target).dataset("val").pairs
        with torch.no_grad():
            parts = [network(part.to(self.device)).cpu() for part in torch.split(pairs.image, 64)]
        answer = torch.cat(parts) if parts else pairs.target
        errors = [(value - pairs.target).double().square().mean().item() for value in (answer, 0 * answer)]
        return errors[0], errors[1], len(pairs.label)

    def started(self, network: nn.Module, factor: float) -> NAttack:
        """NAttack from S, its answers times a factor, and the factor of the targets taken back."""
        return self.attack(initial=network, initial_scale=factor / TARGET_SCALE)

    def costs(self, network: nn.Module) -> dict[float, float]:
        """By factor of S, the mean queries of training images that are not among the pairs, failures with all theirs.

        Kept in a file: what was measured with the same network, attack and images is not measured again.
        """
        given, path = self.given, self.folder / "factors.json"
        dataset = self.data.dataset("train")
        places = range(given.pairs, min(given.pairs + given.factor_images, len(dataset)))
        if not places:
            raise ValueError(
                f"pairs must leave some of the {len(dataset)} training images to choose the factor on, got "
                f"{given.pairs}: lower --pairs"
            )
        x, y, index = (part.to(self.device) for part in dataset.__getitems__(places))
        right = correct(self.model, x, y, index=index)
        x, y, index = x[right], y[right], index[right]
        kept = json.loads(path.read_text()) if path.is_file() else {}
        costs = {}
        for factor in given.factors:
            attack = self.started(network, factor)
            known_by = [configuration(attack), weights_hash(network), weights_hash(self.model), index.tolist()]
            key = hashlib.sha256(json.dumps([known_by, given.budget], sort_keys=True).encode()).hexdigest()[:16]
            if key not in kept:
                oracle = QueryOracle(
                    self.model, len(x), attack.access, given.budget, index=index, seed=attack.seed, known_right=True
                )
                result = attack(oracle, x, y, index=index)
                spent = torch.where(result.success, result.first_hit, result.queries)
                kept[key] = spent.double().mean().item()
                _keep(path, kept)
            costs[factor] = kept[key]
        return costs

    def evaluated(self, name: str, attack: NAttack) -> Found:
        """Attack the test images from one start."""
        folder, clock = self.folder / "attacks", self.folder / "seconds.json"
        protocol = Protocol(name=_slug(name), attack=attack, budget=self.given.budget, max_samples=self.given.images)
        seconds = json.loads(clock.read_text()) if clock.is_file() else {}
        begun = time.process_time()
        trial = Trial(protocol, self.model, f"{self.data.name}/test", self.data.num_classes, folder, progress=True)
        assert trial._archive is not None
        key, resumed = f"{trial._archive.folder.name}.{self.given.images}", bool(trial._known)
        for batch in self.data.test_dataloader():
            trial.add(type(batch)(*(part.to(self.device) for part in batch)))
            if trial.full:
                break
        records = trial.close().unique()
        if not resumed:  # of a run that was broken off the time is not known
            seconds[key] = time.process_time() - begun
            _keep(clock, seconds)
        return Found(name, records, seconds.get(key))

    def run(self) -> Page:
        """All four parts; the table."""
        made = self.pairs()
        print(made)
        if made.missing:
            raise ValueError(f"{made}: wait for the other processes, or start again without RANK and WORLD_SIZE")
        network = self.regression()
        given, costs = self.given, self.costs(network)
        best = min(costs, key=lambda factor: costs[factor])
        starts = {"S": self.started(network, 1.0)}
        if best != 1.0:
            starts[f"S times {best:g}"] = self.started(network, best)
        same = Same(PerturbationPairs(self.pair_folder, target=given.target).dataset("train").pairs.target.mean(0))
        shares = self.costs(same.to(self.device))
        factor = min(shares, key=lambda number: shares[number])
        starts[f"mean of pairs times {factor:g}"] = self.started(same, factor)
        starts |= {f"init_std {std:g}": self.attack(init_std=std) for std in STARTS}
        found = [self.evaluated(name, attack) for name, attack in starts.items()]
        remarks = [*self.remarks(made, costs, *self.errors(network)), *goals(found)]
        page = Page("NAttack-R", self.settings(), HEADS, rows(found), remarks)
        page.write(self.folder, "nattack_r")
        curves = []
        for result in found:
            x, y = queries_curve(result.records)
            curves.append(Curve(result.name, [max(1, value) for value in x.tolist()], y.tolist()))
        figure(self.folder / "nattack_r.png", curves, "queries", "success", "NAttack-R", log=True)
        return page

    def settings(self) -> dict[str, object]:
        """What the figures depend on."""
        given = self.given
        attack = self.attack()
        return {
            "network": f"{given.checkpoint} ({weights_hash(self.model)[:8]})",
            "data": f"{self.data.name}, first {given.images} test images",
            "threat": f"linf {attack.threat.radius:g}",
            "N": given.samples,
            "eta": given.step_size,
            "sigma": attack.sigma,
            "shrink": given.shrink,
            "schedule": given.schedule,
            "check_every": given.check_every,
            "budget": given.budget,
            "seed": attack.seed,
            "pairs from": f"{given.pairs} training images (N {given.pair_samples}, eta {given.pair_step_size}, "
            f"{given.pair_steps} steps, antithetic, init_std 0)",
            "training of S": " ".join(given.train or ()) or "as configured",
            "target": given.target,
            "epochs": given.epochs,
            "device": f"{self.device.type}, {torch.get_num_threads()} threads",
        }

    def remarks(self, made: Made, costs: Mapping[float, float], error: float, zero: float, count: int) -> list[str]:
        """What is to be known of S."""
        told = ", ".join(f"{factor:g}: {cost:,.0f}" for factor, cost in costs.items())
        verdict = "S has learnt something" if error < zero else "S has learnt NOTHING"
        return [
            f"{made}",
            f"validation error of S {error:.4g}, of the answer 0 {zero:.4g}, on {count} pairs held out: {verdict}",
            f"mean queries by factor of S, failures with all theirs, on {self.given.factor_images} further training "
            f"images, where the factor was chosen: {told}",
            "mean of pairs: one start for all images, its factor chosen as S's; what S adds to it is what it sees",
            "the size of the noise was not tuned, S's factor was; the release starts the paper's NATTACK row from "
            "init_std 1.0",
            "queries to success count the tests of the mean; both break: images of the paired comparison with "
            f"{USUAL}; the interval of the ratio of means is a bootstrap over images, 10,000 draws",
            "processor seconds: of this process, all test images, those wrong at first included; empty where a run "
            "was broken off",
            "the paper's rows: its table 4, seconds an image on four TITAN Xp",
        ]


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def _keep(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    os.replace(part, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="NAttack with and without the network that says where to begin.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="network or defence to attack")
    add("--data", choices=tuple(DATA), default="mnist")
    add("--images", type=int, default=250, help="test images, those wrong at first included")
    add("--pairs", type=int, default=1000, help="training images to make pairs of")
    add("--eps", default="0.3", help="radius in linf, e.g. 0.3 or 8/255")
    add("--samples", type=int, default=40, help="N of the attack")
    add("--step_size", type=float, default=0.05, help="eta of the attack")
    add("--shrink", type=float, default=0.1, help="of arctanh space")
    add("--schedule", choices=("mean", "samples"), default="mean", help="mean: the paper's and the release's")
    add("--check_every", type=int, default=1, help="steps between tests of the mean; the release's: 10")
    add("--budget", type=int, default=20_000, help="queries per image")
    add("--pair_samples", type=int, default=100, help="N of the attack that makes pairs")
    add("--pair_step_size", type=float, default=0.1, help="its eta")
    add("--pair_steps", type=int, default=200, help="its steps")
    add("--target", choices=("phi", "image"), default="phi", help="what S learns, see PerturbationPairs")
    add("--epochs", type=int, default=40, help="of training S")
    add("--train", action="append", help="a further flag of train.py, e.g. --train=--trainer.accelerator=cpu")
    add("--factors", type=float, nargs="+", default=list(FACTORS), help="factors of S's answers to try")
    add("--factor_images", type=int, default=50, help="training images to choose it on, none of them among the pairs")
    add("--only_pairs", action="store_true", help="make this process's share of the pairs and stop")
    add("--checkpoints", type=Path, default=Path("checkpoints"), help="where S is kept")
    add("--folder", type=Path, default=None, help="of pairs, records and table; default runs/nattack_r/NETWORK")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if any(flag.startswith("--data") for flag in given.train or ()):
        parser.error("--train must not change the data of S: its error and its factor are measured with the defaults")
    keep_memory()
    if given.folder is None:
        given.folder = Path("runs/nattack_r") / Path(given.checkpoint).stem
    experiment = Experiment(given)
    if given.only_pairs:
        print(experiment.pairs())
        return
    print(experiment.run())
    print(experiment.folder / "nattack_r.md")


if __name__ == "__main__":
    main()
