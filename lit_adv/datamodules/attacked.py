"""Images and their adversarial counterparts, which :mod:`lit_adv.attack_set` has made and kept."""

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
from lit_adv.draws import Draws
from lit_adv.pools import InMemory, Pools, check_least

NOTE = "attack_set.json"
COLUMNS = frozenset({"image", "x_adv", "label", "target", "index", "success", "distance", "queries"})


class AttackedBatch(NamedTuple):
    """Clean images in [0, 1] with their adversarial counterparts, and what is known of them.

    Shape:
        image and x_adv (n, C, H, W) float32. All others (n,) int64: label, the true class; target, the attack's, or
        -1; index, the image's place in its data set; place, the pair's running number in the split served; attack,
        the number of the folder that it lies in.
    """

    image: Tensor
    x_adv: Tensor
    label: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one asks a batch for
    place: Tensor
    attack: Tensor


class AttackedDataset(InMemory[AttackedBatch]):
    """Pairs of one split in memory, all of them its attribute ``pairs``."""


class AttackedImages(LightningDataModule):
    """Pairs of image and adversarial counterpart, of one attack or of several, on one model.

    Of a folder made with ``wanted`` successes those pools are served that complete them, whoever made others beyond.
    Some of the training pairs are held out for validation, by *source image*: all pairs of one image fall on one side.
    Which, is fixed by seed and index. Test pairs come from folders made of test images alone, which never
    serve in training.

    Args:
        train: folder, or folders, of pairs made of training images.
        test: folder, or folders, of pairs made of test images; None: there are none.
        val_share: share of the source images held out of training, in [0, 1).
        batch_size: pairs in a batch, from 1; per process.
        keep_failures: with those whose attack failed, where it moved the image at all; False: successes alone.
        max_pairs: pairs to keep of each training folder, from 1: the first ones; None: all.
        max_test: pairs to keep of each test folder, from 1: the first ones; None: all.
        seed: fixes what is held out and the order of training.
        shuffle: give the training pairs in a new order every epoch.

    Attributes:
        notes: what each folder was made with, by split.
        model_hash: :func:`lit_adv.archive.weights_hash` of the model that was attacked.

    Raises:
        ValueError: an argument out of its range. On reading: folders of another split, model or data set, without a
            pair, or with a pool that is missing or damaged. FileNotFoundError: nothing in a folder.
    """

    def __init__(
        self,
        train: str | Path | list[str],
        test: str | Path | list[str] | None = None,
        val_share: float = 0.1,
        batch_size: int = 128,
        keep_failures: bool = False,
        max_pairs: int | None = None,
        max_test: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share must lie in [0, 1), got {val_share}")
        check_least(1, batch_size=batch_size, max_pairs=max_pairs, max_test=max_test)
        check_least(0, seed=seed)
        self.folders = {"train": _folders("train", train), "test": [] if test is None else _folders("test", test)}
        self.train, self.test = train, test
        self.val_share, self.batch_size, self.keep_failures = float(val_share), batch_size, keep_failures
        self.max_pairs, self.max_test, self.seed, self.shuffle = max_pairs, max_test, seed, shuffle
        self._notes: dict[str, list[dict[str, Any]]] = {}
        self._pairs: dict[str, AttackedDataset] = {}

    @property
    def notes(self) -> dict[str, list[dict[str, Any]]]:
        """What the folders of "train" and "test" were made with, read when first asked for."""
        if not self._notes:
            found = {split: [self._note(split, folder) for folder in self.folders[split]] for split in self.folders}
            _check_agreement([*zip(self.folders["train"], found["train"], strict=True),
                              *zip(self.folders["test"], found["test"], strict=True)])  # fmt: skip
            self._notes = found
        return self._notes

    @property
    def name(self) -> str:  # type: ignore[override]  # no one sets it
        """Of the data set that was attacked."""
        return str(self.notes["train"][0]["data"]["name"])

    @property
    def num_classes(self) -> int:
        """Classes of the data set that was attacked."""
        return int(self.notes["train"][0]["data"]["num_classes"])

    @property
    def dims(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        channels, height, width = self.notes["train"][0]["data"]["dims"]
        return channels, height, width

    @property
    def model_hash(self) -> str:
        """Hash of the model that was attacked."""
        return str(self.notes["train"][0]["model"])

    def setup(self, stage: str | None = None) -> None:
        """Read the pairs that the stage needs."""
        if stage in (None, "fit", "validate"):
            self.dataset("train")
        if stage in ("test", "predict") or (stage is None and self.folders["test"]):
            self.dataset("test")

    def dataset(self, split: Literal["train", "val", "test"]) -> AttackedDataset:
        """The pairs of one split, read when first asked for."""
        if split not in self._pairs:
            if split == "test":
                self._pairs["test"] = self._served(self._read("test", self.max_test))
            else:
                self._pairs |= self._split(self._read("train", self.max_pairs))
        return self._pairs[split]

    def train_dataloader(self) -> DataLoader[AttackedBatch]:
        """Batches of pairs to train on, in a new order every epoch if ``shuffle``."""
        dataset = self.dataset("train")
        sampler = EpochSampler(len(dataset), self.seed) if self.shuffle else None
        return dataset.loader(self.batch_size, self.seed, sampler)

    def val_dataloader(self) -> DataLoader[AttackedBatch] | list[DataLoader[AttackedBatch]]:
        """Batches of the pairs held out; no loader at all where ``val_share`` holds none out."""
        dataset = self.dataset("val")
        return dataset.loader(self.batch_size, self.seed) if len(dataset) else []

    def test_dataloader(self) -> DataLoader[AttackedBatch]:
        """Batches of the pairs made of test images."""
        return self.dataset("test").loader(self.batch_size, self.seed)

    def _note(self, split: str, folder: Path) -> dict[str, Any]:
        note = attacked_pools(folder).existing_note()
        if note["split"] != split:
            raise ValueError(
                f"{folder} was made of {note['split']} images and is given as {split}: test images never serve in "
                "training, nor training images in a test; give each where it belongs"
            )
        return note

    def _read(self, split: str, most: int | None) -> dict[str, Tensor]:
        """The columns of all folders of a split, with the number of the folder."""
        notes = self.notes[split]
        if not notes:
            raise ValueError("test names no folder: give one made by python -m lit_adv.attack_set --split test")
        parts = []
        for number, (folder, note) in enumerate(zip(self.folders[split], notes, strict=True)):
            _, columns = attacked_pools(folder).read()
            kept = columns["success"] | (columns["distance"] > 0) if self.keep_failures else columns["success"]
            chosen = kept.nonzero().squeeze(1)[:most]
            if not len(chosen):
                attack = str(note["attack"]["class_path"]).rpartition(".")[2]
                raise ValueError(f"{folder} holds no pair: {attack} broke none of its images; make others")
            columns["attack"] = torch.full_like(columns["index"], number)
            parts.append({name: value[chosen] for name, value in columns.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _split(self, columns: dict[str, Tensor]) -> dict[str, AttackedDataset]:
        sources = torch.unique(columns["index"])
        # a word of each image alone: whatever other folders are read, it is among the first to be held out or not
        word = Draws(self.seed, sources, torch.zeros_like(sources)).uniform(dtype=torch.float64)
        order = sources[word.argsort(stable=True)]
        held = torch.isin(columns["index"], order[: held_out(self.val_share, len(order))])
        parts = {"train": ~held, "val": held}
        return {split: self._served({k: v[rows] for k, v in columns.items()}) for split, rows in parts.items()}

    def _served(self, columns: dict[str, Tensor]) -> AttackedDataset:
        columns["place"] = torch.arange(len(columns["index"]))
        return AttackedDataset(AttackedBatch(**{name: columns[name] for name in AttackedBatch._fields}))


def attacked_pools(folder: str | Path) -> Pools:
    """A folder of adversarial images.

    Args:
        folder: where they lie, or shall lie.
    """
    maker = "python -m lit_adv.attack_set"
    return Pools(
        Path(folder), NOTE, "adversarial images", maker, COLUMNS, frozenset({"tried"}), _checked,
        later=frozenset({"images"}), whole=True, wins="success",
    )  # fmt: skip


def _checked(note: dict[str, Any]) -> dict[str, Any]:
    for name in ("split", "model"):
        str(note[name])
    str(note["data"]["name"]), int(note["data"]["num_classes"])
    if len(note["data"]["dims"]) != 3 or not note["attack"]["class_path"]:
        raise ValueError("it does not say of which images, or by which attack")
    return {**note, "data": dict(note["data"])}


def _folders(name: str, given: str | Path | Sequence[str]) -> list[Path]:
    folders = [Path(given)] if isinstance(given, str | Path) else [Path(folder) for folder in given]
    if not folders or len(set(folders)) < len(folders):
        raise ValueError(f"{name} must name folders, each once, got {given}")
    return folders


def _check_agreement(found: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """All folders must be of one model and of one data set."""
    (folder, note), *others = found
    for other, theirs in others:
        for what, own, their in (
            ("model", note["model"], theirs["model"]),
            *((f"data set ({name})", note["data"].get(name), theirs["data"].get(name)) for name in ("name", "dims")),
        ):
            if own != their:
                raise ValueError(f"{other} was made with another {what} than {folder}: read folders of one {what} only")
