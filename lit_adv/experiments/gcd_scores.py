"""Scores of all detectors on clean images and on the successes of one attacker, made once and kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_adv.archive import weights_hash
from lit_adv.datamodules import Batch
from lit_adv.datamodules.attacked import AttackedBatch, attacked_pools
from lit_adv.defenses import GuidedComplementary
from lit_adv.detector import Detector, scores
from lit_adv.detectors import (
    InputSensitivity,
    Likelihood,
    LocalIntrinsicDimension,
    Mahalanobis,
    TurningWeakness,
)
from lit_adv.draws import Draws
from lit_adv.experiments.gcd_setup import KINDS, Setup

NAMES = {"image": "org", "saliency": "sal", "sensitivity": "IS"}
DETECTORS = ("org", "sal", "IS", "PD", "TWS", "MDS", "GCD", "LID", "InSen", "MDS*", "LID*")
"""The paper's seven in the order of its table 2, then LID and the sensitivity itself, without any training; a star: as
published, but fitted without noisy images."""

SLOW = ("TWS",)


class Scored(NamedTuple):
    """Scores of one detector, larger for suspicion, in float64.

    Attributes:
        clean, adversarial: of the test pairs, row by row. failed: of attacked test images whose attack did not reach
            its goal, another class or its target, moved or not. held: of clean training-split images that no detector
            has learnt from, to set thresholds by.
        own: threshold that the detector itself decides by; NaN where it has none.
    """

    clean: Tensor
    adversarial: Tensor
    failed: Tensor
    held: Tensor
    own: float


class Ensemble(Detector):
    """GCD's two detectors as one: the margin of the one with the smaller entropy."""

    def __init__(self, defence: GuidedComplementary) -> None:
        super().__init__(defence.classifier)
        self.defence = defence

    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        return self.defence.margin(x)


@dataclass
class Bench:
    """Where scores come from.

    Args:
        setup: networks and attack sets. folder: scores are kept there. held: clean images to set thresholds by; those
            of slow detectors are ``slow`` of them. density: flags of the density's training; None: the
            usual ones.
    """

    setup: Setup
    folder: Path
    held: int = 1000
    slow: int = 200
    density: tuple[str, ...] | None = None

    def detector(self, name: str, attacker: str) -> Detector:
        """A detector by its name in the tables, trained on this attacker's successes; not fitted yet."""
        kinds = {NAMES[kind]: kind for kind in KINDS}
        if name in kinds:
            return self.setup.detector(kinds[name], [attacker])
        if name == "GCD":
            return Ensemble(self.setup.defence([attacker]))
        base = self.setup.base
        if name == "PD":
            return Likelihood(base, self.setup.density(self.density))
        made: dict[str, Callable[[], Detector]] = {
            "TWS": lambda: TurningWeakness(base, **self._tws()),
            "MDS": lambda: Mahalanobis(base),
            "LID": lambda: LocalIntrinsicDimension(base),
            "MDS*": lambda: Mahalanobis(base, noisy=False),
            "LID*": lambda: LocalIntrinsicDimension(base, noisy=False),
            "InSen": lambda: InputSensitivity(base),
        }
        return made[name]()

    def _tws(self) -> dict[str, Any]:
        """The published constants for CIFAR-10; ours, the defaults, for MNIST, which the authors did not try."""
        if self.setup.data == "mnist":
            return {}
        return {"sigma": 0.01, "targeted_step_size": 5e-4, "targeted_eps": 0.5, "untargeted_step_size": 1.0,
                "untargeted_eps": 0.5}  # fmt: skip

    def scored(self, name: str, attacker: str) -> Scored:
        """The scores on an attacker's test pairs of a detector that has learnt from this attacker."""
        ok, failed = self.pairs(attacker)
        detector = self.detector(name, attacker)
        held = self.held_images(self.slow if name in SLOW else self.held)
        train = self.setup.pairs([attacker]).dataset("train").pairs
        seen = hashlib.sha256(weights_hash(detector).encode())
        for part in (ok.image, ok.x_adv, failed.x_adv, held.image, train.x_adv):
            seen.update(part.contiguous().numpy().tobytes())
        path = self.folder / "scores" / attacker.lower() / f"{name}_{seen.hexdigest()[:16]}.safetensors"
        own = 0.0 if name in ("org", "sal", "IS", "GCD") else float("nan")
        if path.is_file():
            return Scored(**load_file(path), own=own)
        print(f"{attacker}: scores of {name}", flush=True)
        detector.fit(self.training_images(), train.image, train.x_adv)
        parts = {
            "clean": (ok.image, ok.index),
            "adversarial": (ok.x_adv, ok.index + _OTHER),  # other random numbers than the clean image's
            "failed": (failed.x_adv, failed.index + _OTHER),
            "held": (held.image, held.index),
        }
        found = {part: scores(detector, x, 128, index) for part, (x, index) in parts.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file(found, unfinished)
        os.replace(unfinished, path)
        return Scored(**found, own=own)

    def pairs(self, attacker: str) -> tuple[AttackedBatch, AttackedBatch]:
        """The test pairs whose attack succeeded, and the failures among the images tried up to the last of them."""
        ok = self.setup.test(attacker)
        _, columns = attacked_pools(self.setup.attacked(attacker, "test")).read()
        last = int((columns["index"] == ok.index[-1]).nonzero()[-1])
        rows = (~columns["success"][:last]).nonzero().squeeze(1)
        columns |= {"place": torch.arange(len(columns["index"])), "attack": torch.zeros_like(columns["index"])}
        return ok, AttackedBatch(**{name: columns[name][rows] for name in AttackedBatch._fields})

    def held_images(self, most: int) -> Batch:
        """Clean images held out of the base network's training, which no detector has seen."""
        data = self.setup.images()
        data.prepare_data()
        dataset = data.dataset("val")
        return dataset.__getitems__(range(min(most, len(dataset))))

    def training_images(self) -> Batch:
        """Clean training images, for what detectors learn of them."""
        data = self.setup.images()
        data.prepare_data()
        return data.training_images(5000)


_OTHER = 10_000_000  # more than any data set's images
