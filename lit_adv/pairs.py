"""Pairs of image and perturbation for NAttack's regression network: NAttack run over training images.

    python -m lit_adv.pairs --model lit_adv.tasks.Checkpoint --model.path checkpoints/therm.ckpt --data MNIST \
        --attack.threat.norm linf --attack.threat.eps 0.3 --attack.shrink 0.1 --attack.steps 200 --attack.samples 100 \
        --attack.step_size 0.1 --attack.schedule mean --attack.check_every 1 --images 1000 --folder runs/pairs

Images of the training split alone, never of a test set; broken off, the same command goes on where it stopped. With
RANK and WORLD_SIZE set each process makes its share, and the pairs are the same as those of one process.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_adv.answers import evaluating
from lit_adv.archive import configuration, weights_hash
from lit_adv.attacks.nattack import NAttack, NAttackState
from lit_adv.datamodules import Batch, ImageDataModule, ImageDataset
from lit_adv.datamodules.pairs import KEPT, pair_pools
from lit_adv.oracle import QueryOracle
from lit_adv.pools import check_least, known_by, moved, share
from lit_adv.verify import correct

_CHUNK = 512  # images in a forward; fixed, so that rounding is the same whatever the machine's memory


class Fate(IntEnum):
    """What became of an image that was tried."""

    PAIR = KEPT
    WRONG_AT_FIRST = 1
    UNBROKEN = 2
    BROKEN_AT_ONCE = 3  # by the mean's first draw, which says nothing of the search


@dataclass(frozen=True)
class Made:
    """How many images became what."""

    tried: int
    pairs: int
    wrong_at_first: int
    unbroken: int
    broken_at_once: int
    missing: int
    """Images of pools that another process has not finished yet."""

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs of {self.tried} training images ({self.wrong_at_first} wrong at first, "
            f"{self.unbroken} unbroken, {self.broken_at_once} broken by the first mean)"
            + (f", {self.missing} images still missing" if self.missing else "")
        )


def make_pairs(
    attack: NAttack,
    model: nn.Module,
    data: ImageDataModule,
    folder: Path,
    images: int = 1000,
    first: int = 0,
    pool: int = 64,
    budget: int | None = None,
    rank: int | None = None,
    world: int | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Made:
    """Attack training images and store the successes: image, mean at success, adversarial image.

    The images are taken in the order of the data module's training split, in pools of a fixed size that are attacked
    and stored one by one: a pool is there as a whole or not at all, so a run that was broken off, and any number of
    processes, make the same pairs. The attack's success is the search's own; no second look is
    taken, beyond the confirmation of hits on random models.

    Args:
        attack: NAttack with ``schedule="mean"``, whose mean renders the very image that was adversarial.
        model: network or defence to attack.
        data: its training split is used, without augmentation; what it holds out for validation is left out.
        folder: where the pairs go; of one attack, model and data set alone.
        images: training images to try, in the split's order. first: place in it to begin at, for others than before.
        pool: images that are attacked together and stored in one file.
        budget: queries per image; None: no limit.
        rank: of this process; None: the environment's RANK, else 0. world: processes that share the work; None: the
            environment's WORLD_SIZE, else 1.
        device: to move the model to, e.g. "cuda", of several processes each to its own; None: where it is.
        progress: show a progress bar.

    Returns:
        What became of the images, over all processes as far as they have come.

    Raises:
        ValueError: an attack without a mean to keep, a number out of range, or a folder made with something else.
    """
    rank, world = share(rank, world)
    _check(attack)
    check_least(1, images=images, pool=pool)
    check_least(0, first=first, budget=budget)
    model = moved(model, device)
    data.prepare_data()
    dataset = data.untransformed("train")  # never a test image
    places = torch.arange(len(dataset))[first : first + images]
    if not len(places):
        raise ValueError(f"first must be less than the {len(dataset)} training images, got {first}")
    pools = pair_pools(folder)
    pools.begin(identity(attack, model, data, dataset, first, pool, budget), rank)

    def make(chosen: list[int]) -> dict[str, Tensor]:
        return attacked(attack, model, dataset.__getitems__(chosen), budget)

    with evaluating(model):
        pools.fill(places, pool, make, rank, world, progress)
    return counted(folder, len(places), -(-len(places) // pool))


def attacked(attack: NAttack, model: nn.Module, batch: Batch, budget: int | None = None) -> dict[str, Tensor]:
    """The columns of one pool: what was tried and became of it, and the pairs among it.

    Shape: batch of n images; "tried" and "fate" (n,), the pairs' columns of one length.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    x, y, index = (part.to(device) for part in batch)
    right = correct(model, x, y, index=index, seed=attack.seed, chunk=_CHUNK)
    fate = torch.full_like(y, Fate.WRONG_AT_FIRST)
    chosen = right.nonzero().squeeze(1)
    x, y, places = x[chosen], y[chosen], index[chosen]
    means: dict[int, Tensor] = {}

    def keep(state: NAttackState) -> None:
        means.update(zip(state.rows.tolist(), state.phi, strict=True))

    watched = copy.copy(attack)
    watched.leaving = keep
    oracle = QueryOracle(model, len(x), attack.access, budget, _CHUNK, index=places, seed=attack.seed, known_right=True)
    result = watched(oracle, x, y, index=places)
    at_once = result.success & (result.iterations == 0)
    unbroken = torch.full_like(y, Fate.UNBROKEN)
    fate[chosen] = unbroken.masked_fill(result.success, Fate.PAIR).masked_fill(at_once, Fate.BROKEN_AT_ONCE)
    kept = (result.success & ~at_once).nonzero().squeeze(1)
    size = (x.shape[1], min(x.shape[2], attack.latent), min(x.shape[3], attack.latent))
    phi = torch.stack([means[row] for row in kept.tolist()]) if len(kept) else x.new_zeros(0, *size)
    return {
        "image": x[kept], "x_adv": result.x_adv[kept], "phi": phi, "label": y[kept], "index": places[kept],
        "iterations": result.iterations[kept], "queries": result.first_hit[kept], "tried": index, "fate": fate,
    }  # fmt: skip


def identity(
    attack: NAttack,
    model: nn.Module,
    data: ImageDataModule,
    dataset: ImageDataset,
    first: int,
    pool: int,
    budget: int | None,
) -> dict[str, Any]:
    """All that decides the pairs, ready for JSON."""
    settings = {name: getattr(data, name) for name in ("seed", "val_split", "max_train")}
    images = known_by(dataset.labels, dataset.__getitems__([0, len(dataset) - 1]).image)
    return {
        "what": "images of the training split and the means of NAttack that broke them; no evaluation images",
        "attack": configuration(attack),
        "initial": weights_hash(attack.initial) if isinstance(attack.initial, nn.Module) else None,
        "model": weights_hash(model),
        "data": {"name": data.name, "split": "train", "num_classes": data.num_classes, "images": images, **settings},
        "first": first,
        "pool": pool,
        "budget": budget,
        "shrink": attack.shrink,
        "box": list(attack.threat.box),
    }


def counted(folder: Path, images: int, pools: int) -> Made:
    """How many of the images tried so far, in the first pools of a folder, became what."""
    fates = [shard["fate"] for number, shard in pair_pools(folder).shards() if number < pools]
    fate = torch.cat(fates)[:images] if fates else torch.zeros(0, dtype=torch.int64)
    kept, wrong, unbroken, at_once = (int((fate == kind).sum()) for kind in Fate)
    return Made(len(fate), kept, wrong, unbroken, at_once, max(0, images - len(fate)))


def _check(attack: NAttack) -> None:
    if attack.schedule != "mean":
        raise ValueError(
            f"schedule must be 'mean' to make pairs, got {attack.schedule!r}: with other schedules a sample may be "
            "adversarial where the mean is not"
        )
    if attack.objective != "adversarial" or not attack.stop_at_hit:
        raise ValueError("the attack must end at its first hit to make pairs: objective adversarial, stop_at_hit true")


def main() -> None:
    """Make pairs from the command line."""
    from jsonargparse import auto_cli

    try:
        print(auto_cli(make_pairs, as_positional=False))
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
