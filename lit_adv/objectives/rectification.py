"""Fine-tuning a rectifier: the true class of adversarial images whose suspect pixels are suppressed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lit_adv.answers import evaluating
from lit_adv.inputs import precise
from lit_adv.kept import KeptByPlace
from lit_adv.objectives.objective import LabelledImages, Objective, correct, cross_entropy
from lit_adv.suppression import suppressed


class Attacked(LabelledImages, Protocol):
    """A batch of clean images, row by row with adversarial ones made of them."""

    @property
    def x_adv(self) -> Tensor: ...


class Rectifying(Protocol):
    """What of a defence a rectifier is trained with, see :class:`lit_adv.defenses.GuidedComplementary`."""

    classifier: nn.Module
    rectifier: nn.Module
    share: float

    def suspects(self, x: Tensor) -> Tensor: ...


class Rectification(Objective):
    """Cross-entropy of the rectifier at the true class of patched images.

    Each adversarial image comes in several randomised duplicates, drawn anew at every step, whether a detector finds it
    or not; what to suspect in it is found once and kept, for that costs a double backward and depends on frozen
    detectors alone. Clean images patched in the same way are mixed in, lest the rectifier forget what those
    look like that a detector wrongly finds. The rectifier's normalisation layers keep the statistics they came with.

    Args:
        duplicates: Of each adversarial image at every step, at least 1; the paper does not say. A step is on
            ``batch * duplicates / (1 - clean_fraction)`` images, so by default a batch of 10 pairs is one on 125.
        clean_fraction: Share of clean images among those trained on, in [0, 1); 0 in the paper.

    Raises:
        ValueError: If a number lies outside its range; when called, if the model has nothing to train.

    References:
        Li, Wang & Wu 2020, "Are L2 adversarial examples intrinsically different?", section 3.2.
    """

    def __init__(self, duplicates: int = 10, clean_fraction: float = 0.2) -> None:
        if duplicates < 1 or duplicates != int(duplicates):
            raise ValueError(f"duplicates must be a whole number of at least 1, got {duplicates}")
        if not 0.0 <= clean_fraction < 1.0:
            raise ValueError(f"clean_fraction must lie in [0, 1), got {clean_fraction}")
        self.duplicates = duplicates
        self.clean_fraction = clean_fraction
        self.masks = Masks()

    def __call__(self, model: nn.Module, batch: LabelledImages) -> tuple[Tensor, dict[str, Tensor]]:
        batch = attacked(batch)
        defense = rectifying(model)
        device, images = batch.image.device, len(batch.label)
        duplicates = images * self.duplicates
        share = self.clean_fraction / (1 - self.clean_fraction)  # of clean ones, beside the adversarial ones
        rows = torch.arange(images, device=device).repeat_interleave(self.duplicates)
        x, mask = batch.x_adv[rows], self.masks(model, batch.x_adv)[rows]
        clean = round(share * duplicates)
        if clean:
            chosen = torch.randperm(images, device=device)[:clean]
            turns = torch.arange(clean, device=device) % len(chosen)
            x = torch.cat([x, batch.image[chosen[turns]]])
            mask = torch.cat([mask, self.masks(model, batch.image[chosen])[turns]])
            rows = torch.cat([rows, chosen[turns]])
        label = batch.label[rows]
        with statistics_kept(defense.rectifier):
            logits: Tensor = defense.rectifier(suppressed(x, mask, defense.share))
        right = correct(logits, label)
        logs = {"accuracy": right[:duplicates]}
        if clean:
            logs["clean_accuracy"] = right[duplicates:]
        return cross_entropy(logits, label), logs


class Masks:
    """The suspects of images, found when first asked for and then kept, at most 2 GiB, under the images' own bytes.

    So no image is given another's mask, whatever data set and order it comes in. The detectors must not be trained in
    between; another model or other settings have masks of their own.
    """

    def __init__(self) -> None:
        self._kept = KeptByPlace()

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """Which values of images to suppress.

        Shape:
            (n, C, H, W) -> (n, C, H, W) bool
        """

        def found(rows: Tensor) -> Tensor:
            with evaluating(model), precise(x):
                return rectifying(model).suspects(x[rows].detach())

        settings = [id(model), *(getattr(model, name, None) for name in ("alpha", "mode", "joint", "reading"))]
        return self._kept(_names(x, repr(settings)), found)


def _names(x: Tensor, further: str) -> Tensor:
    """A word for each image by its bytes and what further decides, (n,) int64."""
    start = hashlib.blake2b(further.encode(), digest_size=8)
    words = []
    for image in x.detach().cpu().contiguous().view(torch.uint8):
        word = start.copy()
        word.update(image.numpy().tobytes())
        words.append(int.from_bytes(word.digest(), signed=True))
    return torch.tensor(words, dtype=torch.int64, device=x.device)


def rectifying(model: nn.Module) -> Rectifying:
    """The model as one with a rectifier to train.

    Raises:
        ValueError: If it has none, or cannot say what to suspect.
    """
    if not (isinstance(getattr(model, "rectifier", None), nn.Module) and callable(getattr(model, "suspects", None))):
        raise ValueError(
            f"the model must be a defence with a rectifier, e.g. GuidedComplementary with rectifier=..., and "
            f"{type(model).__name__} has none"
        )
    return cast(Rectifying, model)


def attacked(batch: LabelledImages) -> Attacked:
    """The batch as one with adversarial images beside the clean ones.

    Raises:
        ValueError: If it has none.
    """
    if not isinstance(getattr(batch, "x_adv", None), Tensor):
        raise ValueError(
            f"a batch must hold adversarial images 'x_adv' to rectify, {type(batch).__name__} does not: choose data "
            "with them, e.g. lit_adv.datamodules.AttackedImages"
        )
    return cast(Attacked, batch)


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Normalisation layers in eval mode: they use the statistics they have and learn no others."""
    norms = [layer for layer in network.modules() if isinstance(layer, _NormBase) and layer.training]
    for layer in norms:
        layer.training = False
    try:
        yield
    finally:
        for layer in norms:
            layer.training = True
