"""What the experiments on GCD are set up with: base networks, attack sets, detectors, the command line.

Everything is made once and found again: base networks and detectors lie in ``checkpoints/``, adversarial images in
``runs/attacked/``. Training images and test images are attacked apart from one another; no test image serves in any
detector's training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lit_adv.archive import weights_hash
from lit_adv.attack_set import make_attack_set
from lit_adv.cli import keep_memory
from lit_adv.datamodules import MNIST, CIFAR10Jpeg, ImageDataModule
from lit_adv.datamodules.attacked import AttackedBatch, AttackedImages, attacked_pools
from lit_adv.defenses import GuidedComplementary
from lit_adv.detector import NetworkDetector
from lit_adv.experiments.catalogue import protocol_of
from lit_adv.experiments.trained import trained
from lit_adv.protocol import Protocol
from lit_adv.tasks import Checkpoint

Target = Literal["none", "random"]


class Attacker(NamedTuple):
    """An attacker of the tables.

    Attributes:
        config: file of the attack. arguments: of it, by data set; "" for all. target: none or random.
        family: linf attacks of a fixed radius, or nearest images in l2.
    """

    config: str
    arguments: Mapping[str, Mapping[str, Any]]
    target: Target
    family: Literal["linf", "l2"]


_LINF: dict[str, Mapping[str, Any]] = {
    "mnist": {"threat": {"norm": "linf", "eps": 0.3}, "steps": 40, "step_size": 0.01, "stop_at_hit": False},
    "cifar10_jpeg": {
        "threat": {"norm": "linf", "eps": "8/255"},
        "steps": 10,
        "step_size": 2 / 255,
        "stop_at_hit": False,
    },
}
_ONE: dict[str, Mapping[str, Any]] = {
    "mnist": {"threat": {"norm": "linf", "eps": 0.3}, "step_size": 0.3, "stop_at_hit": False},
    "cifar10_jpeg": {"stop_at_hit": False},
}
_L2 = {"norm": "l2", "eps": "inf"}
ATTACKERS: dict[str, Attacker] = {
    "FGSM-U": Attacker("fgsm_linf", _ONE, "none", "linf"),
    "PGD-U": Attacker("pgd_linf", _LINF, "none", "linf"),
    "PGD-T": Attacker("pgd_linf", _LINF, "random", "linf"),
    "DFool-U": Attacker("deepfool_l2", {}, "none", "l2"),
    "CW-U": Attacker("carlini_wagner_small_l2_mnist", {}, "none", "l2"),
    "CW-T": Attacker("carlini_wagner_small_l2_mnist", {}, "random", "l2"),
    "DDN-U": Attacker("ddn_l2", {"": {"steps": 50}}, "none", "l2"),
    "DDN-T": Attacker("ddn_l2", {"": {"steps": 50}}, "random", "l2"),
}
"""The paper's eight, at the sizes of a small run: C&W 4 constants of 200 iterations, DDN 50 steps of 8-bit images."""

ALPHA = {"mnist": 0.55, "cifar10_jpeg": 0.65}
"""The paper's, against untargeted attacks; a defender does not know which it faces."""

DENSITY: dict[str, tuple[str, tuple[str, ...]]] = {
    "mnist": ("mnist_pixelcnn", (
        "--data.max_train=12000", "--data.val_split=1000", "--data.batch_size=32", "--epochs=4",
    )),
    "cifar10_jpeg": ("cifar10_pixelcnn", ()),
}  # fmt: skip
"""Configuration and flags of the density's training."""

KINDS = ("image", "sensitivity", "saliency")
"""The detectors that are trained networks."""


@dataclass(frozen=True)
class Setup:
    """What is protected, and how large everything is.

    Args:
        data: mnist or cifar10_jpeg. size: "small" (two convolutions; small detectors) or "vgg11".
        train_pairs, test_pairs: successes per attack that detectors learn from and are tested on.
        epochs: of every detector; None: as configured. config: a further configuration of every training.
        folder: of attack sets. checkpoints: of networks. flags: further flags of every training.
    """

    data: str = "mnist"
    size: str = "small"
    train_pairs: int = 600
    test_pairs: int = 200
    epochs: int | None = None
    config: Path | None = None
    folder: Path = Path("runs/attacked")
    checkpoints: Path = Path("checkpoints")
    flags: tuple[str, ...] = ()
    _known: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def module(self) -> Callable[..., ImageDataModule]:
        """The data module's class."""
        return {"mnist": MNIST, "cifar10_jpeg": CIFAR10Jpeg}[self.data]

    @property
    def tag(self) -> str:
        """Names data, size and what trainings were changed by, for files that must not be mixed up."""
        words = [self.data, self.size]
        if self.config is not None:
            words.append(f"{self.config.stem}_{hashlib.sha256(self.config.read_bytes()).hexdigest()[:6]}")
        return "_".join(words)

    @property
    def base_path(self) -> Path:
        """The base network's checkpoint, trained if it is missing."""
        config = {
            "mnist": {"small": "mnist_two_conv", "vgg11": "mnist_vgg11"},
            "cifar10_jpeg": {"vgg11": "cifar10_vgg11"},
        }
        known = config[self.data]
        if self.size not in known:
            raise ValueError(f"size must be {' or '.join(known)} for {self.data}, got {self.size!r}")
        name = known[self.size]
        there = self.checkpoints / f"{name}.ckpt"
        if self.config is None and self.data == "mnist" and there.is_file():
            return there  # however it was trained: the page tells its weights
        changes = ["--data=" + str(_DATA[self.data])] if self.data == "cifar10_jpeg" else []
        return trained(name if self.config is None else f"{self.tag}_base", name, *changes, *self._extra,
                       folder=self.checkpoints)  # fmt: skip

    @property
    def base(self) -> nn.Module:
        """The network that is protected."""
        network: nn.Module = self._once("base", lambda: Checkpoint(self.base_path))
        return network

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @property
    def _extra(self) -> list[str]:
        return [*([] if self.config is None else ["--config", str(self.config)]), *self.flags]

    def images(self, **arguments: Any) -> ImageDataModule:
        """The data that is attacked; the training split is always the same, whatever a training was cut to."""
        return self.module(val_split=5000, **arguments)

    def protocol(self, attacker: str, **changes: Any) -> Protocol:
        """An attacker of the tables as a protocol, for evaluations; ``attack``: further arguments of the attack."""
        chosen = ATTACKERS[attacker]
        arguments = {**chosen.arguments.get("", {}), **chosen.arguments.get(self.data, {}), **changes.pop("attack", {})}
        if attacker.startswith("FGSM"):
            arguments.pop("steps", None)
        return protocol_of(chosen.config, attacker, arguments, target=chosen.target, **changes)

    def attacked(self, attacker: str, split: Literal["train", "test"]) -> Path:
        """The folder of an attack set, made if it is missing."""
        found: Path = self._once((attacker, split), lambda: self._attack(attacker, split))
        return found

    def _attack(self, attacker: str, split: Literal["train", "test"]) -> Path:
        where = self.folder / self.tag / attacker.lower() / split
        wanted = self.train_pairs if split == "train" else self.test_pairs
        data = self.images()
        protocol = self.protocol(attacker)
        data.prepare_data()
        most = len(data.dataset(split))
        note = attacked_pools(where).note()  # what is there goes on as it was begun
        small = 128 if wanted >= 128 else 32  # so that a small run attacks little more than it wants
        pool = small if note is None else int(note["pool"])
        made = make_attack_set(
            protocol.attack, self.base, data, where, split, most, wanted, pool=pool, target=protocol.target
        )
        print(f"{attacker} {split}: {made}", flush=True)
        return where

    def pairs(self, attackers: Sequence[str]) -> AttackedImages:
        """Successful attacks on training and test images, of one attacker or pooled over several."""
        return AttackedImages(
            [str(self.attacked(name, "train")) for name in attackers],
            [str(self.attacked(name, "test")) for name in attackers],
            max_pairs=self.train_pairs, max_test=self.test_pairs,
        )  # fmt: skip

    def test(self, attacker: str) -> AttackedBatch:
        """The test pairs of an attacker: at most ``test_pairs`` successes."""
        return self.pairs([attacker]).dataset("test").pairs

    def network(self, config: str, flags: Sequence[str] = ()) -> nn.Module:
        """A further network, of a configuration and flags; under ``config`` it has a name of its own."""

        def make() -> nn.Module:
            there = self.checkpoints / f"{config}.ckpt"
            if self.config is None and there.is_file():
                return Checkpoint(there)  # however it was trained: the page tells its weights
            name = config if self.config is None else f"{self.tag}_{config}"
            further = [] if self.config is None else ["--config", str(self.config)]
            return Checkpoint(trained(name, config, *flags, *further, *self.flags, folder=self.checkpoints))

        found: nn.Module = self._once(("network", config, *flags), make)
        return found

    def density(self, flags: Sequence[str] | None = None) -> nn.Module:
        """The density of clean images, trained if it is missing; ``flags`` instead of the usual ones."""
        config, usual = DENSITY[self.data]
        return self.network(config, usual if flags is None else flags)

    def detector_path(self, kind: str, attackers: Sequence[str]) -> Path:
        """The checkpoint of a detector trained on the successes of these attackers, trained if it is missing."""
        stem = {"mnist": f"mnist_{self.size}", "cifar10_jpeg": "cifar10_vgg11"}[self.data]
        whom = "pooled" if len(attackers) > 1 else attackers[0].lower()
        folders = [str(self.attacked(name, "train")) for name in attackers]
        short = hashlib.sha256(" ".join(attackers).encode()).hexdigest()[:4] if len(attackers) > 1 else ""
        name = f"gcd_{self.tag}_{self.train_pairs}_{kind}_{whom}{short}"
        flags = [f"--data.train={folders}", "--data.test=null", f"--data.max_pairs={self.train_pairs}"]
        flags += [f"--model.model.classifier.path={self.base_path}"]
        flags += [] if self.epochs is None else [f"--epochs={self.epochs}"]
        return trained(
            name, f"{stem}_detector_{kind}", *flags, *self.flags, folder=self.checkpoints,
            learnt_from=self.learnt_from(attackers),
        )  # fmt: skip

    def learnt_from(self, attackers: Sequence[str]) -> dict[str, str]:
        """Hashes of the base network and of how these attackers' training images were made, for a training's note."""
        notes = [attacked_pools(self.attacked(name, "train")).existing_note() for name in attackers]
        made = [[note[key] for key in ("model", "split", "attack", "target")] for note in notes]
        sets = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        return {"base network": weights_hash(self.base)[:16], "attack sets": sets[:16]}

    def detector(self, kind: str, attackers: Sequence[str]) -> NetworkDetector:
        """A trained detector, its classifier the base network itself."""
        make = lambda: Checkpoint(self.detector_path(kind, attackers))  # noqa: E731
        found = self._once((kind, *attackers), make)
        assert isinstance(found, NetworkDetector)
        return found

    def defence(self, attackers: Sequence[str], **settings: Any) -> GuidedComplementary:
        """GCD with detectors trained on these attackers; ``settings``: arguments of the defence."""
        whole = {"alpha": ALPHA[self.data], **settings}
        return GuidedComplementary(
            self.base, self.detector("image", attackers), self.detector("sensitivity", attackers), **whole
        ).eval()


_DATA = {"cifar10_jpeg": Path(__file__).resolve().parents[2] / "configs" / "data" / "cifar10_jpeg.yaml"}


def at_least(least: int) -> Callable[[str], int]:
    """For a command line: a whole number from ``least`` on."""

    def whole(word: str) -> int:
        if int(word) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {word}")
        return int(word)

    return whole


def share(word: str) -> float:
    """For a command line: a number in [0, 1]."""
    if not 0 <= float(word) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {word}")
    return float(word)


def command_line(
    doc: str | None, arguments: Sequence[str] | None, folder: Path, more: Callable[[argparse.ArgumentParser], None]
) -> tuple[argparse.Namespace, Setup]:
    """Parse the flags that all commands share, and those that ``more`` adds; set up the process."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", choices=("mnist", "cifar10_jpeg"), default="mnist")
    add("--size", choices=("small", "vgg11"), default=None, help="of base and detectors; mnist: small, else vgg11")
    add("--attackers", nargs="+", default=list(ATTACKERS), choices=list(ATTACKERS), metavar="NAME")
    add("--train_pairs", type=at_least(1), default=600, help="pairs per attack that detectors learn from")
    add("--test_pairs", type=at_least(1), default=200, help="pairs per attack that they are tested on")
    add("--epochs", type=at_least(1), default=None, help="of the detectors; default: as configured")
    add("--config", type=Path, default=None, help="further configuration of the base network's training")
    add("--train", nargs="*", default=[], metavar="FLAG", help="flags of every training, e.g. trainer.precision=...")
    add("--folder", type=Path, default=folder, help="records, tables, figures")
    add("--sets", type=Path, default=Path("runs/attacked"), help="where adversarial images lie")
    add("--checkpoints", type=Path, default=Path("checkpoints"), help="where networks lie")
    add("--threads", type=at_least(1), default=1, help="threads of the processor")
    more(parser)
    given = parser.parse_args(arguments)
    if given.config is not None and not given.config.is_file():
        parser.error(f"--config {given.config}: there is no such file")
    size = given.size or ("small" if given.data == "mnist" else "vgg11")
    if size == "small" and given.data != "mnist":
        parser.error(f"--size {size}: for {given.data} there is vgg11 alone")
    torch.set_num_threads(given.threads)
    keep_memory()
    setup = Setup(
        given.data, size, given.train_pairs, given.test_pairs, given.epochs, given.config, given.sets,
        given.checkpoints, tuple(f"--{flag}" for flag in given.train),
    )  # fmt: skip
    return given, setup
