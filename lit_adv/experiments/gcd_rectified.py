"""What rectifiers and other defences make of clean and adversarial images, kept image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_adv.answers import evaluating
from lit_adv.archive import Archive, fingerprint, weights_hash
from lit_adv.datamodules.attacked import attacked_pools
from lit_adv.defenses import GuidedComplementary, PixelDefend, TotalVariation
from lit_adv.draws import Draws
from lit_adv.experiments.gcd_setup import ALPHA, ATTACKERS, Setup
from lit_adv.experiments.trained import trained
from lit_adv.suppression import MaskMode, suppressed, suspects
from lit_adv.tasks import Checkpoint

ALPHA_TARGETED = {"mnist": 0.60, "cifar10_jpeg": 0.70}
"""The paper's, against targeted attacks."""

EVERY = -1e30
"""A threshold that lets every image be rectified."""

EPS_D = {"mnist": 32, "cifar10_jpeg": 16}
"""The authors' radius of PixelDefend, in levels of 255."""

_CPU = "--trainer.accelerator=cpu"
_FEW = "--data.max_train=20000"
TRAINED: dict[tuple[str, str, str], tuple[str, tuple[str, ...]]] = {
    ("mnist", "small", "pgd_at"): (
        "mnist_madry_two_conv", ("--config", "configs/probe/pgd10_mnist.yaml", _FEW, _CPU),
    ),
    ("mnist", "small", "ddn_at"): ("mnist_ddn_two_conv", (_FEW, _CPU)),
    ("mnist", "vgg11", "pgd_at"): ("mnist_madry_vgg11", ()),
    ("mnist", "vgg11", "ddn_at"): ("mnist_ddn_vgg11", ()),
}  # fmt: skip
"""Configuration and flags of the adversarially trained networks, by data, size and column."""

_KEY = -29  # of the draws here
_CHUNK = 128

Ask = Callable[[Tensor, Draws], Tensor]
"""What is to be noted of images: (n, C, H, W) and draws to integers (n, k)."""


class Images(NamedTuple):
    """Test images to be answered.

    Attributes:
        name: of the attacker, or "clean". x (n, C, H, W). label, index (n,). success: whether the attack on the
            undefended classifier broke it; False for clean images.
    """

    name: str
    x: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one asks for
    success: Tensor


def clean_images(setup: Setup, most: int) -> Images:
    """The first test images, whatever the classifier makes of them."""
    data = setup.images()
    data.prepare_data()
    dataset = data.dataset("test")
    image, label, index = dataset.__getitems__(list(range(min(most, len(dataset)))))
    return Images("clean", image, label, index, torch.zeros(len(label), dtype=torch.bool))


def attacked_images(setup: Setup, attacker: str) -> Images:
    """All test images right at first, attacked, up to the success that completes the number wanted.

    Where the attack failed its last candidate counts, or, of an attack without a radius, the image as it was.
    """
    _, columns = attacked_pools(setup.attacked(attacker, "test")).read()
    success = columns["success"]
    rows = (success.cumsum(0) - success.long() < setup.test_pairs).nonzero().squeeze(1)
    return Images(attacker, *(columns[name][rows] for name in ("x_adv", "label", "index", "success")))


@dataclass
class Bench:
    """Defences of one classifier, and what they answer.

    Args:
        setup: classifier, attack sets, detectors. folder: answers are kept there.
        epochs: of rectifiers; None: as configured. averages: draws of a rectified image, see the defence.
        mode, share: how suspects are chosen and how many of them replaced, see the defence.
        seed: of all draws.
    """

    setup: Setup
    folder: Path
    epochs: int | None = None
    averages: int = 1
    mode: MaskMode = "threshold"
    share: float = 0.5
    seed: int = 0
    _checked: dict[tuple[tuple[str, ...], float], Path] = field(default_factory=dict, repr=False)

    def alphas(self, attacker: str) -> tuple[float, ...]:
        """The paper's value against untargeted attacks, then, for a targeted attacker, that against targeted ones."""
        further = () if ATTACKERS[attacker].target == "none" else (ALPHA_TARGETED[self.setup.data],)
        return (ALPHA[self.setup.data], *further)

    def rectifier_path(self, attackers: Sequence[str], alpha: float) -> Path:
        """The checkpoint of detectors and rectifier for these attackers, trained if it is missing."""
        setup = self.setup
        detectors = {kind: setup.detector_path(kind, attackers) for kind in ("image", "sensitivity")}
        stem = {"mnist": f"mnist_{setup.size}", "cifar10_jpeg": "cifar10_vgg11"}[setup.data]
        head, _, tail = detectors["image"].stem.rpartition("_image_")
        name = f"{head}_rectifier_{tail}_{self.mode}{100 * alpha:g}_{100 * self.share:g}"
        folders = [str(setup.attacked(attacker, "train")) for attacker in attackers]
        flags = [f"--data.train={folders}", "--data.test=null", f"--data.max_pairs={setup.train_pairs}"]
        flags += [f"--model.model.{place}.path={setup.base_path}" for place in ("classifier", "rectifier")]
        flags += [f"--model.model.{kind}_detector.path={path}" for kind, path in detectors.items()]
        flags += [f"--model.model.{key}={value}" for key, value in
                  (("alpha", alpha), ("mode", self.mode), ("share", self.share))]  # fmt: skip
        flags += [] if self.epochs is None else [f"--epochs={self.epochs}"]
        return trained(
            name, f"{stem}_rectifier", *flags, *setup.flags, folder=setup.checkpoints,
            learnt_from=setup.learnt_from(attackers),
        )  # fmt: skip

    def rectified(self, attackers: Sequence[str], alpha: float) -> GuidedComplementary:
        """The defence that rectifies, its detectors and rectifier trained on these attackers' training images.

        Raises:
            ValueError: the detectors have been trained anew since the rectifier was.
        """
        key = (tuple(attackers), alpha)
        if key in self._checked:
            return self._read(self._checked[key])
        path = self.rectifier_path(attackers, alpha)
        defence = self._read(path)
        for kind in ("image", "sensitivity"):
            now = self.setup.detector(kind, attackers).state_dict()
            then = getattr(defence, f"{kind}_detector").state_dict()
            if not all(torch.equal(then[name], value) for name, value in now.items()):
                raise ValueError(f"{path} was trained behind another {kind} detector: move it away to train it anew")
        self._checked[key] = path
        return defence

    def _read(self, path: Path) -> GuidedComplementary:
        defence = Checkpoint(path)
        assert isinstance(defence, GuidedComplementary)
        return defence.variant(answer="rectify", averages=self.averages).eval()

    def baseline(self, name: str) -> nn.Module | None:
        """A defence of another kind by its column, pd, tvm, pgd_at or ddn_at; None: there is none for this data."""
        setup = self.setup
        if name == "tvm":
            return TotalVariation(setup.base).eval()
        if name == "pd":
            return PixelDefend(setup.base, setup.density(), EPS_D[setup.data]).eval()
        known = TRAINED.get((setup.data, setup.size, name))
        return None if known is None else setup.network(*known)

    def decisions(self, model: nn.Module, images: Images) -> Tensor:
        """Predicted classes (n,)."""

        def ask(x: Tensor, draws: Draws) -> Tensor:
            return label(model, x, draws)[:, None]

        return self.kept({"decisions": weights_hash(model)}, images, ask, model)[:, 0]

    def judged(self, defence: GuidedComplementary, images: Images) -> Tensor:
        """What the defence makes of images, (n, 5), see :data:`JUDGED`."""
        every = defence.variant(threshold=EVERY)
        bare = every.variant(rectifier=defence.classifier)

        def ask(x: Tensor, draws: Draws) -> Tensor:
            flagged = (defence.margin(x) > defence.threshold).long()
            answers = [label(model, x, draws) for model in (defence, every, bare)]
            return torch.stack([*answers, flagged, defence.suspects(x).flatten(1).sum(1)], 1)

        return self.kept({"judged": _hash(defence)}, images, ask, defence)

    def passed(self, defence: GuidedComplementary, images: Images) -> Tensor:
        """The class that comes out, and whether the detectors flag the image: (n, 2)."""

        def ask(x: Tensor, draws: Draws) -> Tensor:
            return torch.stack([label(defence, x, draws), (defence.margin(x) > defence.threshold).long()], 1)

        return self.kept({"passed": _hash(defence)}, images, ask, defence)

    def swept(
        self, defence: GuidedComplementary, images: Images, alphas: Sequence[float], modes: Sequence[MaskMode]
    ) -> Tensor:
        """Classes of every image rectified at each alpha, (n, modes, alphas, 2): by f_rec, and by f as it is."""

        rectifier = defence.rectifier
        assert rectifier is not None

        def ask(x: Tensor, draws: Draws) -> Tensor:
            sensitivity = defence.sensitivity(x)  # once: the costly part does not depend on alpha
            found = []
            rows = torch.arange(len(x))
            for mode in modes:
                for alpha in alphas:
                    mask = suspects(sensitivity, alpha, mode, defence.joint)
                    patched = suppressed(x, mask, defence.share, draws[rows])
                    found += [network(patched).argmax(-1) for network in (rectifier, defence.classifier)]
            return torch.stack(found, 1)

        what = {"swept": _hash(defence), "alphas": list(alphas), "modes": list(modes)}
        return self.kept(what, images, ask, defence).view(len(images.x), len(modes), len(alphas), 2)

    def kept(self, what: Mapping[str, Any], images: Images, ask: Ask, *models: nn.Module) -> Tensor:
        """What is to be noted of each image, (n, k) int64; what was noted before is read, not asked again.

        Args:
            what: decides it, beside images and seed.
        """
        archive = Archive(self.folder / "answers" / images.name.lower(), {**what, "seed": self.seed})
        known, found = archive.load(), {}
        prints = [fingerprint(x, int(y)) for x, y in zip(images.x, images.label, strict=True)]
        for row, (index, print_) in enumerate(zip(images.index.tolist(), prints, strict=True)):
            if known.get(index, {}).get("image") == print_:
                found[row] = known[index]["answer"]
        missing = torch.tensor([row for row in range(len(prints)) if row not in found], dtype=torch.int64)
        for rows in torch.split(missing, _CHUNK) if len(missing) else ():
            draws = Draws(self.seed, images.index[rows], torch.zeros_like(rows), _KEY)
            with evaluating(*models), torch.no_grad():
                answers = ask(images.x[rows], draws).tolist()
            found |= dict(zip(rows.tolist(), answers, strict=True))
            archive.append(
                [
                    {"index": int(images.index[row]), "image": prints[row], "answer": found[row]}
                    for row in rows.tolist()
                ],
                {},
            )
        return torch.tensor([found[row] for row in range(len(prints))], dtype=torch.int64)


def _hash(defence: GuidedComplementary) -> str:
    """Of a defence whose networks share the classifier, as after its first call: the same before and after that."""
    defence._settle()
    return weights_hash(defence)


JUDGED = ("pipeline", "oracle", "without fine-tuning", "flagged", "suspects")
"""The class that comes out; that when every image is rectified, and then by f as it is; whether the detectors flag the
image; how many of its values are suspects."""


def label(model: nn.Module, x: Tensor, draws: Draws) -> Tensor:
    """Predicted classes (n,) of a network or defence; each call sees the same draws."""
    given = {"draws": draws[torch.arange(len(x))]} if getattr(model, "stochastic", False) else {}
    decided: Tensor = model(x, **given).argmax(-1)
    return decided
