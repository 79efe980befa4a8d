"""Attacks on clean images that a detector refuses: the paper counts them, an evaluation does not attack them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_adv.archive import Archive, configuration, fingerprint, learnt, weights_hash
from lit_adv.datamodules import Batch
from lit_adv.draws import Draws
from lit_adv.inputs import class_count
from lit_adv.metrics import Records
from lit_adv.oracle import QueryOracle
from lit_adv.protocol import Protocol, identity
from lit_adv.verify import fresh_labels, verify


def refuses(model: nn.Module, x: Tensor) -> Tensor:
    """Whether images (n, C, H, W) are refused, (n,) bool."""
    reject = getattr(model, "reject", None)
    labels = fresh_labels(model, x)[:, 0]
    return torch.zeros_like(labels, dtype=torch.bool) if reject is None else labels == reject


def on_alarms(model: nn.Module, protocol: Protocol, batch: Batch, folder: Path) -> Records:
    """Attack clean images that are refused though the classifier is right; they stay in the paper's denominator.

    An evaluation leaves them out, for to its user they are errors. Images that an earlier run has finished are read.

    Args:
        batch: such images, perhaps none.
    """
    if not len(batch.label):
        return Records.empty()
    attack, known_by = protocol.attack, configuration(identity(protocol))
    archive = Archive(folder / protocol.name, {**known_by, "weights": weights_hash(model)} | learnt(attack))
    known = archive.load()
    prints = [fingerprint(x, int(y)) for x, y in zip(batch.image, batch.label, strict=True)]
    there = [known.get(int(i), {}).get("image") == p for i, p in zip(batch.index, prints, strict=True)]
    rows = [known[int(i)] for i, old in zip(batch.index, there, strict=True) if old]
    fresh = torch.tensor([not old for old in there], dtype=torch.bool)
    if fresh.any():
        found = _attack_all(model, protocol, Batch(*(part[fresh] for part in batch))).rows()
        new = [p for p, old in zip(prints, there, strict=True) if not old]
        made = [{**row, "image": p} for row, p in zip(found, new, strict=True)]
        archive.append(made, {})
        rows += made
    return Records.from_rows(rows).unique()


def _attack_all(model: nn.Module, protocol: Protocol, batch: Batch) -> Records:
    """Attack images whatever the model says of them; ``clean_correct`` says that they were attacked."""
    x, y, index = batch
    attack, target = protocol.attack, None
    if protocol.target == "random":  # as an evaluation draws it
        draws, classes = Draws(attack.seed, index, torch.full_like(index, -5)), class_count(model, [], None)
        target = (y + 1 + draws.integers(classes - 1)) % classes
    oracle = QueryOracle(
        model, len(x), protocol.granted, protocol.budget, index=index, seed=attack.seed, known_right=True
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the gradient was exactly 0 or not finite")
        found = attack(oracle, x, y, target, index)
    seen = verify(model, attack.threat, found.x_adv, x, y, target, index=index, seed=attack.seed)
    delta = (found.x_adv.double() - x.double()).flatten(1)
    return Records(
        index=index, label=y, target=torch.full_like(y, -1) if target is None else target,
        clean_correct=torch.ones_like(seen.any), claimed=found.success, verified=seen.verified & found.success,
        verified_any=seen.any, verified_mean=seen.mean, rounded=seen.rounded & found.success,
        distance=found.distance, l2=delta.norm(dim=1), linf=delta.abs().amax(1), queries=found.queries,
        checks=found.checks, first_hit=found.first_hit, iterations=found.iterations,
    )  # fmt: skip
