"""Pairs of an image and the perturbation that an attack found for it, to regress the one on the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_adv.datamodules.base import held_out
from lit_adv.datamodules.dataset import EpochSampler
from lit_adv.pools import InMemory, Pools, check_least

NOTE = "pairs.json"
TARGET_SCALE = 100.0
"""Factor of the targets unless said otherwise."""

KEPT = 0
"""The fate of an image whose pair is kept; see :class:`lit_adv.pairs.Fate`."""

COLUMNS = frozenset({"image", "x_adv", "phi", "label", "index", "iterations", "queries"})
EACH = frozenset({"tried", "fate"})


class PairBatch(NamedTuple):
    """Images in [0, 1], what a network shall answer of them, their classes and places in the training data.

    Shape:
        image (n, C, H, W) and target (n, C, h, w) float32; label and index (n,) int64.
    """

    image: Tensor
    target: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one asks a batch for


class PairDataset(InMemory[PairBatch]):
    """Pairs of one split in memory, all of them its attribute ``pairs``."""


class PerturbationPairs(LightningDataModule):
    """Pairs that :func:`lit_adv.pairs.make_pairs` has made from training images.

    There is no test set: no evaluation image is ever among the pairs. Some are held out for validation, by a
    permutation of the pairs that ``seed`` fixes; with more pairs others are held out, so a network is trained anew.

    Args:
        folder: where the pairs lie.
        val_share: share of the pairs held out, in [0, 1).
        batch_size: pairs in a batch, from 1; per process.
        target_scale: factor of the targets, so that the error is of order 1; what the network says is to be divided
            by it again (NAttack's ``initial_scale``).
        target: ``phi``: the mean of the search distribution that was found, as appendix A.4 of the paper and its code
            have it. ``image``: the way from the image to the adversarial one in arctanh space, as its section 2.2 has
            it, with the attack's ``shrink``; where the perturbation was clipped the two differ.
        max_pairs: pairs to keep, from 1: the first ones by place; None: all.
        seed: fixes what is held out and the order of training.
        shuffle: give the pairs in a new order every epoch.

    Raises:
        ValueError: an argument out of its range. FileNotFoundError: no pairs in the folder.

    References:
        Li et al. 2019, https://arxiv.org/abs/1905.00441, section 2.2 and appendix A.4; the factor of 100 is that of
        their released code.
    """

    def __init__(
        self,
        folder: str | Path,
        val_share: float = 0.1,
        batch_size: int = 64,
        target_scale: float = TARGET_SCALE,
        target: Literal["phi", "image"] = "phi",
        max_pairs: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share must lie in [0, 1), got {val_share}")
        if target not in ("phi", "image"):
            raise ValueError(f"target must be 'phi' or 'image', got {target!r}")
        if not target_scale > 0:
            raise ValueError(f"target_scale must be > 0, got {target_scale}")
        check_least(1, batch_size=batch_size, max_pairs=max_pairs)
        self.folder, self.val_share, self.batch_size = Path(folder), float(val_share), batch_size
        self.target_scale, self.target, self.max_pairs = target_scale, target, max_pairs
        self.seed, self.shuffle = seed, shuffle
        self.name, self.num_classes = "", 0
        self._pairs: dict[str, PairDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the pairs."""
        self.dataset("train")

    def dataset(self, split: Literal["train", "val"]) -> PairDataset:
        """The pairs of one split, read when first asked for."""
        if not self._pairs:
            note, columns = read_pairs(self.folder)
            self.name = f"pairs of {note['data']['name']}"
            self.num_classes = int(note["data"]["num_classes"])
            self._pairs = self._split(note, columns)
        return self._pairs[split]

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Batches of pairs to train on, in a new order every epoch if ``shuffle``."""
        dataset = self.dataset("train")
        sampler = EpochSampler(len(dataset), self.seed) if self.shuffle else None
        return dataset.loader(self.batch_size, self.seed, sampler)

    def val_dataloader(self) -> DataLoader[PairBatch] | list[DataLoader[PairBatch]]:
        """Batches of the pairs held out; no loader at all where ``val_share`` holds none out."""
        dataset = self.dataset("val")
        return dataset.loader(self.batch_size, self.seed) if len(dataset) else []

    def _split(self, note: dict[str, Any], columns: dict[str, Tensor]) -> dict[str, PairDataset]:
        kept = slice(None) if self.max_pairs is None else slice(self.max_pairs)
        columns = {name: value[kept] for name, value in columns.items()}
        target = columns["phi"]
        if self.target == "image":
            if note.get("attack", {}).get("init_args", {}).get("space") == "pixel":
                target = columns["x_adv"] - columns["image"]
            else:
                target = arctanh_way(columns["image"], columns["x_adv"], float(note["shrink"]), note["box"])
        target = target.float() * self.target_scale
        if not target.isfinite().all():
            raise ValueError(f"the targets in {self.folder} hold NaN or inf: make the pairs again, in another folder")
        pairs = PairDataset(PairBatch(columns["image"].float(), target, columns["label"], columns["index"]))
        total = len(pairs)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
        trained = total - held_out(self.val_share, total)
        parts = {"train": order[:trained], "val": order[trained:]}
        return {name: PairDataset(pairs.__getitems__(places.tolist())) for name, places in parts.items()}


def arctanh_way(image: Tensor, x_adv: Tensor, shrink: float, box: Sequence[float] = (0.0, 1.0)) -> Tensor:
    """From an image to an adversarial one in arctanh space: atanh(s (2 x' - 1)) - atanh(s (2 x - 1)), s = 1 - shrink.

    Shape: image and x_adv (n, C, H, W), in the box, to the same.
    """
    low, high = box
    ways = [torch.atanh((1 - shrink) * (2 * (x.double() - low) / (high - low) - 1)) for x in (image, x_adv)]
    return (ways[1] - ways[0]).to(image.dtype)


def pair_pools(folder: str | Path) -> Pools:
    """A folder of pairs.

    Args:
        folder: where they lie, or shall lie.
    """
    maker, later = "python -m lit_adv.pairs", frozenset({"images"})
    return Pools(Path(folder), NOTE, "pairs", maker, COLUMNS, EACH, _checked, later)


def read_pairs(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the pairs in a folder were made with, and their columns, in the order of the training split.

    Raises:
        FileNotFoundError: no pairs there. ValueError: the folder's note is damaged.
    """
    return pair_pools(folder).read()


def _checked(note: dict[str, Any]) -> dict[str, Any]:
    return {**note, "data": dict(note["data"]), "shrink": float(note["shrink"]), "box": list(note["box"])}
