"""What the tables and figures of adversarial transformation share: their networks, their sizes, their measurements.

Networks that are missing are trained, under names that tell the size; those that are there are kept. Attacks go on
where they stopped, and finished figures are kept as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from lit_adv.archive import weights_hash
from lit_adv.attacks import PGD
from lit_adv.datamodules import Batch
from lit_adv.defenses.adversarial_transformation import AdversarialTransformation
from lit_adv.draws import Draws
from lit_adv.estimators import Autograd
from lit_adv.experiments.trained import trained
from lit_adv.experiments.transformation_setup import CONFIGS, FAMILIES, NETWORK, STEPS, Recipe
from lit_adv.losses import cross_entropy
from lit_adv.metrics import Records
from lit_adv.protocol import Protocol
from lit_adv.tasks import Checkpoint
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial
from lit_adv.verify import fresh_labels

_MEAN_OF_G, _CLEAN = -8, -9  # keys of random numbers that no attack uses


class Bench:
    """Trains what is missing and measures it, at one size on one data set.

    Args:
        given: what :func:`~lit_adv.experiments.transformation_setup.command_line` found.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.family = given, FAMILIES[given.data]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = Path(given.folder) / "_".join(filter(None, [given.data, given.tag]))
        self.data = self.family.module(batch_size=128, max_test=given.images)

    @property
    def threat(self) -> ThreatModel:
        """The attacker's ball."""
        return ThreatModel("linf", self.family.eps)

    @property
    def values(self) -> int:
        """Values in an image."""
        return math.prod(self.data.dims)

    def train(self, name: str, config: str, *flags: str) -> Path:
        """The checkpoint of a network, trained if it is missing."""
        given = self.given
        bare = given.config is None
        own = [] if given.data == self.family.stem else [f"--data={CONFIGS}/data/{given.data}.yaml"]
        own += ["--trainer.accelerator=cpu"] if bare and self.device.type == "cpu" and self.family.on_gpu else []
        own += [] if bare else ["--config", str(given.config)]
        if given.max_train is not None:  # few images of a reduced training, and few to validate it
            own += [f"--data.max_train={given.max_train}", f"--data.val_split={max(100, given.max_train // 10)}"]
        own += [] if given.epochs is None else [f"--epochs={given.epochs}"]
        full = "_".join(filter(None, [given.data, name, given.tag]))
        own += [] if given.precision is None else [f"--trainer.precision={given.precision}"]
        return trained(full, config, *own, *flags, folder=Path(given.checkpoints))

    def network(self, name: str, recipe: Recipe) -> nn.Module:
        """A trained network, on the device."""
        return Checkpoint(self.train(name, recipe[0], *recipe[1])).to(self.device)

    def reference(self, epochs: int | None = None) -> Path:
        """f_b, adversarially trained, or trained on clean images for so many epochs."""
        stem = self.family.stem
        if epochs is None:
            return self.train("reference", f"{stem}_reference")
        return self.train(f"reference_standard{epochs}", f"{stem}_reference_standard", f"--epochs={epochs}")

    def defence(self, name: str = "", reference: Path | None = None, **settings: float) -> AdversarialTransformation:
        """f_a behind g, trained with these settings of g; ``reference``: None for the adversarially trained f_b."""
        path = self.reference() if reference is None else reference
        configured = Path("checkpoints", f"{self.family.stem}_reference.ckpt")
        change = [] if path == configured else [f"{NETWORK}.init_args.reference.init_args.path={path}"]
        return self._behind(name, change, settings)

    def untrained(self) -> AdversarialTransformation:
        """f_a behind a g whose f_b has never been trained."""
        recipe = json.dumps(self._recipe_of_reference())
        return self._behind("untrained", [f"{NETWORK}.init_args.reference={recipe}"], {})

    def _behind(self, name: str, changes: Sequence[str], settings: Mapping[str, float]) -> AdversarialTransformation:
        usual = {"delta": self.family.delta, "steps": STEPS}
        settings = {key: value for key, value in settings.items() if usual.get(key) != value}
        told = "_".join(f"{key}{value:g}" for key, value in settings.items())
        chosen = [f"{NETWORK}.init_args.{key}={value:g}" for key, value in settings.items()]
        full = "_".join(filter(None, ["transformation", name, told]))
        network = self.network(full, (f"{self.family.stem}_transformation", (*changes, *chosen)))
        assert isinstance(network, AdversarialTransformation)
        return network

    def _recipe_of_reference(self) -> Any:
        """How f_b is built, as its checkpoint says."""
        recipe = getattr(Checkpoint(self.reference()), "recipe", None)
        if recipe is None:
            raise ValueError("the checkpoint of f_b does not say how it is built: train it by its configuration")
        return without_nothing(recipe)

    def images(self) -> Batch:
        """The test images, on the device."""
        self.data.prepare_data()
        self.data.setup("test")
        parts = [Batch(*batch) for batch in self.data.test_dataloader()]
        return Batch(*(torch.cat(column).to(self.device) for column in zip(*parts, strict=True)))

    def pgd(self, eot: int | None = None, **changes: Any) -> PGD:
        """The white-box attack, of the same total length whatever its number of steps."""
        steps = self.given.steps
        size = self.family.step_size * max(1.0, self.family.steps / steps)
        settings: dict[str, Any] = {"estimator": Autograd(eot), "stop_at_hit": False, **changes}
        return PGD(self.threat, steps, size, **settings)

    def tried(self, model: nn.Module, name: str, protocol: Protocol, images: int | None = None) -> Records:
        """What an attack does to the first test images, read where an earlier run has written it down."""
        protocol = replace(protocol, max_samples=min(images or self.given.images, self.given.images))
        folder = self.folder / "attacks" / name
        batch = self.images()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*with eot=1 follows the gradient of one draw")  # so it is meant
            warnings.filterwarnings("ignore", message=".*the gradient was exactly 0 or not finite")  # a finding here
            trial = Trial(protocol, model, f"{self.data.name}/test", self.data.num_classes, folder, progress=True)
            for place in range(0, len(batch.label), 128):
                trial.add(Batch(*(part[place : place + 128] for part in batch)))
                if trial.full:
                    break
            return trial.close().unique()

    def kept(self, name: str, model: nn.Module, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """A figure of a model, made once: it lies in a file named after all that decides it."""
        known = {"weights": weights_hash(model), "data": self.given.data, "images": self.given.images, **settings}
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
        path = self.folder / "figures" / f"{name}_{digest}.json"
        if path.is_file():
            return json.loads(path.read_text())
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(path)
        return value

    def standard(self, model: nn.Module) -> Standing:
        """The share of clean images that is classified rightly, over draws."""
        judges = self.given.judges if getattr(model, "stochastic", False) else 1
        found = self.kept("standard", model, {"judges": judges}, lambda: self._right(model, judges))
        return standing(torch.tensor(found, dtype=torch.bool))

    def _right(self, model: nn.Module, judges: int) -> list[list[bool]]:
        x, y, index = self.images()
        found: list[list[bool]] = (fresh_labels(model, x, judges, index, key=_CLEAN) == y[:, None]).cpu().tolist()
        return found

    def drift(self, defence: AdversarialTransformation, draws: int) -> Drift:
        """How far the mean of g over its draws lies from the image."""
        return Drift(*self.kept("drift", defence, {"draws": draws}, lambda: self._drift(defence, draws)))

    def _drift(self, defence: AdversarialTransformation, draws: int) -> tuple[float, float]:
        batch, largest, mean = self.images(), [], []
        for place in range(0, len(batch.label), 128):
            x, _, index = (part[place : place + 128] for part in batch)
            total = torch.zeros_like(x, dtype=torch.float64)
            for number in range(draws):
                total += defence.transform(x, Draws(0, index, torch.full_like(index, number), _MEAN_OF_G)).double()
            off = (x.double() - total / draws).flatten(1).abs()
            largest.append(off.amax(1))
            mean.append(off.mean(1))
        return torch.cat(largest).mean().item(), torch.cat(mean).mean().item()

    def settings(self, defence: AdversarialTransformation, **more: object) -> dict[str, object]:
        """What a reader of the figures must know."""
        given, family = self.given, self.family
        size = "delta / 6" if defence.step_size is None else f"{defence.step_size:g}"
        return {
            "data": f"{given.data}, the first {given.images:,} test images",
            "g": f"mode {defence.mode}, {defence.norm}, Delta {family.delta:g} and N {STEPS} where no other is "
            f"named, step {size}, random start {defence.random_start}, box {defence.box}",
            "attacker": f"linf, eps {family.eps:g}",
            "training": self._training(),
            "draws by which an image is judged": given.judges,
            "seeds": "0 for training, attacks and judgement; 1 for the sources of transferred images",
            **more,
        }

    def _training(self) -> str:
        given = self.given
        file: Any = {} if given.config is None else yaml.safe_load(given.config.read_text()) or {}
        data = file.get("data")
        inside = data.get("init_args") or {} if isinstance(data, dict) else {}
        most = given.max_train or inside.get("max_train")
        epochs = given.epochs or file.get("epochs")
        if epochs is None and most is None:
            return "as configured"
        images = "all" if most is None else f"the first {most:,}"
        length = "epochs as configured" if epochs is None else f"{epochs} epochs where no other is named"
        source = "" if given.config is None else f" ({given.config.name})"
        return f"REDUCED SIZE: {images} training images, {length}{source}; no figure here compares with the paper's"

    @property
    def white_box(self) -> str:
        """The white-box attack in words."""
        attack = self.pgd()
        how = "random start, cross-entropy of the true label, all steps, the last confirmed hit kept"
        return f"PGD, {attack.steps} steps of {attack.step_size:.4g}, {how}"


def without_nothing(recipe: Any) -> Any:
    """A recipe without arguments that are None: on a command line they are left out."""
    if isinstance(recipe, Mapping):
        return {key: without_nothing(value) for key, value in recipe.items() if value is not None}
    return recipe


class Standing(NamedTuple):
    """Shares of images: right in one draw (mean over draws, and its spread), in most draws, in all of them."""

    mean: float
    spread: float
    majority: float
    all: float


class Drift(NamedTuple):
    """Of x - E g(x): the mean over images of the largest absolute value, and the mean absolute value."""

    largest: float
    mean: float


def standing(right: Tensor) -> Standing:
    """Shares from answers, (n, draws) bool: whether each is right."""
    per_draw = right.double().mean(0)
    spread = per_draw.std().item() if right.shape[1] > 1 else 0.0
    most = right.double().mean(1)
    return Standing(
        per_draw.mean().item(), spread, (most > 0.5).double().mean().item(), (most == 1).double().mean().item()
    )


def robust(records: Records) -> Standing:
    """Shares of images that stay right under attack: in one draw, in most draws, in all; no spread is known.

    Judged by fresh draws on the image returned, whether or not the attack claims it: an image transferred once may
    fail in that one draw and succeed in most.
    """
    right, wrong = records.clean_correct, records.verified_mean
    mean = torch.where(right, 1 - wrong, 0.0).mean().item()
    return Standing(
        mean,
        0.0,
        (right & (wrong < 0.5)).double().mean().item(),
        (right & ~records.verified_any).double().mean().item(),
    )


def within(records: Records, budget: int) -> float:
    """Share of images that stay right if the attacker has so many queries: from one run's first hits."""
    broken = records.verified & (records.first_hit >= 0) & (records.first_hit <= budget)
    return (records.clean_correct & ~broken).double().mean().item()


def floor(delta: float, draws: int, values: int) -> Drift:
    """What the mean of uniform noise in [-delta, delta] alone would show of so many values: median largest, mean."""
    deviation = delta / math.sqrt(3 * draws)
    quantile = torch.special.ndtri(torch.tensor((1 + 0.5 ** (1 / values)) / 2, dtype=torch.float64)).item()
    return Drift(deviation * quantile, deviation * math.sqrt(2 / math.pi))


def cosines(defence: AdversarialTransformation, x: Tensor, y: Tensor, surrogate: str) -> Tensor:
    """Cosine between the gradient through a surrogate and that of BPDA-I, per image; NaN where one is 0."""
    own, other = (_gradient(ask, x, y).flatten(1).double() for ask in (defence, getattr(defence, surrogate)))
    return (own * other).sum(1) / (own.norm(dim=1) * other.norm(dim=1))


def _gradient(ask: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    parts = []
    for place in range(0, len(x), 32):
        with torch.enable_grad():
            leaf = x[place : place + 32].detach().clone().requires_grad_()
            loss = cross_entropy(ask(leaf), y[place : place + 32])
            parts.append(torch.autograd.grad(loss.sum(), leaf)[0])
    return torch.cat(parts)


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f}"


def spread(found: Standing) -> str:
    """The mean over draws and its spread, in per cent."""
    return f"{100 * found.mean:.1f} ± {100 * found.spread:.1f}"


MASKING = (
    "The defence works by masking gradients: the Jacobian of g is the identity almost everywhere, and what an attack "
    "through it finds is an upper bound of the robust accuracy, no more."
)
COUNTING = (
    "All images count, those wrong at first as broken. 'one draw': the mean over draws of the share that is right; "
    "'most draws': an image counts as right where more than half of the draws are; 'all draws': where all are."
)
