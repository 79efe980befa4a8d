"""Trials of a small classifier on thirty images, four of which it gets wrong at first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from contracts.nets import Counting, Small, decided, images
from safetensors.torch import load_file
from torch import Tensor

from lit_adv.attacks import PGD, NAttack, Transfer
from lit_adv.datamodules import Batch
from lit_adv.metrics import Records
from lit_adv.protocol import Protocol
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial

COUNT = 30
WRONG = [3, 11, 12, 29]
X = images(COUNT)
EXACT = ("index", "label", "target", "clean_correct", "claimed", "verified", "verified_any", "rounded", "queries",
         "checks", "first_hit", "iterations")  # fmt: skip


def labels() -> Tensor:
    """The model's own decisions but for four images that it gets wrong."""
    y = decided(Small(), X)
    y[WRONG] = (y[WRONG] + 1) % 4
    return y


Y = labels()


def nattack(**arguments: Any) -> Protocol:
    """A black-box attack that breaks about half of the images."""
    attack = NAttack(ThreatModel(eps=0.015), steps=4, samples=10, step_size=0.1, sigma=0.5, shrink=0.1)
    return Protocol(**({"name": "nattack", "attack": attack, "pool": 6} | arguments))


def pgd(**arguments: Any) -> Protocol:
    return Protocol(**({"name": "pgd", "attack": PGD(ThreatModel(eps=0.008), steps=4)} | arguments))


def transfer(**arguments: Any) -> Protocol:
    """PGD on another model, whose images are tried once."""
    attack = Transfer(PGD(ThreatModel(eps=0.008), steps=4), [Small(seed=3)])
    return Protocol(**({"name": "transfer", "attack": attack} | arguments))


def batches(size: int, index: Tensor | None = None) -> list[Batch]:
    index = torch.arange(COUNT) if index is None else index
    return [Batch(X[part], Y[part], part) for part in index.split(size)]


def run(trial: Trial, size: int = 5, index: Tensor | None = None) -> Records:
    for batch in batches(size, index):
        trial.add(batch)
    return trial.close().unique()


def model() -> Counting:
    return Counting(Small(), X).eval()


def assert_same(one: Records, other: Records, exact: tuple[str, ...] = EXACT) -> None:
    ours, theirs = one.columns(), other.columns()
    for name in ours:
        if name in exact:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9, msg=name)


def stored(folder: Path) -> dict[int, Tensor]:
    """The adversarial images on disk, the newest of each place."""
    found: dict[int, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns):
        shard = load_file(path)
        found |= dict(zip(shard["index"].tolist(), shard["x_adv"], strict=True))
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()]
