"""Adversarial counterparts of a data set, made once and kept: for detectors, denoisers and cascades.

    python -m lit_adv.attack_set --attack configs/attack/ddn_l2_mnist.yaml --model lit_adv.tasks.Checkpoint \
        --model.path checkpoints/mnist_two_conv.ckpt --data MNIST --data.val_split 5000 --split train --images 1000 \
        --wanted 600 --folder runs/attacked/ddn/train

The attack is a file of ``configs/attack``, whose target classes and budget hold too, or a class with its arguments.
Broken off, the same command goes on where it stopped. With RANK and WORLD_SIZE set each process makes its share, and
the images are the same as those of one process: :class:`lit_adv.datamodules.AttackedImages` serves them up to the pool
that completes what was wanted, and no others that some process may have made beyond it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

import lit_adv.attacks  # noqa: F401 - so that a command line may name them without their module
from lit_adv.answers import evaluating
from lit_adv.archive import configuration, fingerprint, learnt, weights_hash
from lit_adv.attack import Attack, check_images
from lit_adv.datamodules import Batch, ImageDataModule, ImageDataset
from lit_adv.datamodules.attacked import attacked_pools
from lit_adv.look import first_look, targets
from lit_adv.oracle import QueryOracle
from lit_adv.pools import Pools, check_least, known_by, moved, share
from lit_adv.protocol import Target
from lit_adv.verify import correct, verify

_CHUNK = 512  # images in a forward; fixed, so that rounding is the same whatever the machine's memory


@dataclass(frozen=True)
class Made:
    """What became of the images, up to those that were wanted.

    Attributes:
        tried: images looked at. right: of them, classified rightly and so attacked. successes: of these, broken.
        missing: images of pools that another process has not finished yet.
    """

    tried: int
    right: int
    successes: int
    missing: int

    def __str__(self) -> str:
        return f"{self.successes} successes of {self.right} images right at first, of {self.tried} tried" + (
            f", {self.missing} images still missing" if self.missing else ""
        )


def make_attack_set(
    attack: Attack,
    model: nn.Module,
    data: ImageDataModule,
    folder: Path,
    split: Literal["train", "test"] = "train",
    images: int = 1000,
    wanted: int | None = None,
    first: int = 0,
    pool: int = 128,
    target: Target = "none",
    quantise: bool = False,
    budget: int | None = None,
    rank: int | None = None,
    world: int | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Made:
    """Attack the images of a split that the model is right about, and store image, counterpart and success.

    The images are taken in the split's order, without augmentation or transforms, in pools that are attacked and stored
    one by one. A success is claimed by the attack and confirmed by :func:`lit_adv.verify.verify`. What an attack
    without a radius found nothing for stays the clean image; under a radius an unbroken image is the last candidate.

    Args:
        attack: learns from training images first, where it has to.
        model: network or defence to attack.
        data: what is held out of its training split for validation is left out.
        folder: where they go; of one attack, model and data set alone.
        split: "train" or "test".
        images: most images to try, in the split's order. first: place in it to begin at.
        wanted: end as soon as the finished pools, without a gap from the first, hold so many successes; None: all
            images. Pools beyond that another process had under way stay, and are served only when more is wanted. A
            folder keeps the largest number that was asked for.
        pool: images that are attacked together and stored in one file.
        target: target classes: none (untargeted), the next class, one drawn by (seed, index), or the least likely.
        quantise: round to k / 255 inside the ball, and judge success by what is left.
        budget: queries per image; None: no limit.
        rank: of this process; None: the environment's RANK, else 0. world: processes that share the work; None: the
            environment's WORLD_SIZE, else 1.
        device: to move the model to, e.g. "cuda", of several processes each to its own; None: where it is.
        progress: show a progress bar.

    Returns:
        What became of the images, over all processes as far as they have come.

    Raises:
        ValueError: a number out of range, a folder made with something else, or no success in all images.
    """
    rank, world = share(rank, world)
    _check(split, target)
    check_least(1, images=images, wanted=wanted, pool=pool)
    check_least(0, first=first, budget=budget)
    model = moved(model, device)
    data.prepare_data()
    dataset = data.untransformed(split)
    places = torch.arange(len(dataset))[first : first + images]
    if not len(places):
        raise ValueError(f"first must be less than the {len(dataset)} images of split {split!r}, got {first}")
    _look_first(attack, model, dataset, places, data.num_classes)
    pools = attacked_pools(folder)
    settings = {"split": split, "first": first, "pool": pool, "target": target, "quantise": quantise, "budget": budget}
    _fit(attack, data, pools, identity(attack, model, data, dataset, settings))
    pools.begin(identity(attack, model, data, dataset, settings), rank, wanted)  # anew: it knows what was learnt

    def make(chosen: list[int]) -> dict[str, Tensor]:
        batch = dataset.__getitems__(chosen)
        return attacked(attack, model, batch, target, data.num_classes, quantise, budget)

    def enough() -> bool:
        return wanted is not None and not counted(pools, len(places), pool, wanted).missing

    with evaluating(model):
        pools.fill(places, pool, make, rank, world, progress, enough)
    made = counted(pools, len(places), pool, wanted)
    _refuse_fruitless(made, attack, model)
    return made


def _fit(attack: Attack, data: ImageDataModule, pools: Pools, note: dict[str, Any]) -> None:
    """Have an attack learn what it needs, beside the images it will make."""
    if not attack.needs_fit:
        return
    pools.refuse(note, but=["learnt"])  # before a file is written into what may be another set's folder
    pools.folder.mkdir(parents=True, exist_ok=True)
    seen = data.training_images()
    attack.fit(seen.image, seen.label, str(pools.folder / "fitted.safetensors"))


def _refuse_fruitless(made: Made, attack: Attack, model: nn.Module) -> None:
    if made.missing or made.successes:
        return
    name, why = type(attack).__name__, f"{type(model).__name__} is right about none of them: choose its own data"
    if made.right:
        why = "give it more images or steps, a larger radius or budget"
    raise ValueError(f"{name} broke none of {made.tried} images ({made.right} of them right at first): {why}")


def attacked(
    attack: Attack,
    model: nn.Module,
    batch: Batch,
    target: Target = "none",
    classes: int = 0,
    quantise: bool = False,
    budget: int | None = None,
) -> dict[str, Tensor]:
    """The columns of one pool: what was tried, and what became of the images that the model is right about.

    Shape: batch of n images; "tried" (n,), the other columns of one length.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    x, y, tried = (part.to(device) for part in batch)
    chosen = correct(model, x, y, index=tried, seed=attack.seed, chunk=_CHUNK).nonzero().squeeze(1)
    x, y, index = x[chosen], y[chosen], tried[chosen]
    goal = targets(target, model, x, y, index, classes, attack.seed, _CHUNK)
    oracle = QueryOracle(model, len(x), attack.access, budget, _CHUNK, index=index, seed=attack.seed, known_right=True)
    result = attack(oracle, x, y, goal, index)
    x_adv, threat = result.x_adv, attack.threat
    if threat.radius == torch.inf:
        x_adv = torch.where(result.success[:, None, None, None], x_adv, x)
    moved = (x_adv != x).flatten(1).any(1)
    if quantise:
        x_adv = torch.where(moved[:, None, None, None], threat.quantize(x_adv, x), x)
    seen = verify(model, threat, x_adv, x, y, goal, index=index, seed=attack.seed, chunk=_CHUNK)
    return {
        "image": x, "x_adv": x_adv, "label": y, "target": torch.full_like(y, -1) if goal is None else goal,
        "index": index, "success": result.success & seen.verified,
        "distance": (x_adv.double() - x.double()).flatten(1).norm(dim=1).float(), "queries": result.queries,
        "tried": tried,
    }  # fmt: skip


def identity(
    attack: Attack, model: nn.Module, data: ImageDataModule, dataset: ImageDataset, settings: dict[str, Any]
) -> dict[str, Any]:
    """All that decides the images, ready for JSON."""
    names = ("max_test",) if settings["split"] == "test" else ("seed", "val_split", "max_train")
    ends = dataset.__getitems__([0, len(dataset) - 1])
    return {
        "attack": configuration(attack),
        "learnt": learnt(attack),
        "model": weights_hash(model),
        "data": {
            "name": data.name,
            "num_classes": data.num_classes,
            "dims": list(ends.image.shape[1:]),
            "first image": fingerprint(ends.image[0], int(ends.label[0])),
            "images": known_by(dataset.labels, ends.image),
            **{name: getattr(data, name) for name in names},
        },
        **settings,
    }


def counted(pools: Pools, images: int, pool: int, wanted: int | None = None) -> Made:
    """What became of the first images of a folder; with ``wanted``, up to the pool that completes so many successes."""
    tried = right = successes = missing = 0
    for number, part in enumerate(torch.split(torch.arange(images), pool)):
        found = pools.look(number, ("tried", "index", "success"))
        if found is None:
            missing += len(part)
            continue
        asked = found["tried"][: len(part)]
        kept = torch.isin(found["index"], asked)
        tried, missing = tried + len(asked), missing + len(part) - len(asked)
        right, successes = right + int(kept.sum()), successes + int(found["success"][kept].sum())
        if wanted is not None and not missing and successes >= wanted:
            break
    return Made(tried, right, successes, missing)


def _check(split: str, target: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if target not in ("none", "next", "random", "least_likely"):
        raise ValueError(f"target must be none, next, random or least_likely, got {target!r}")


def _look_first(attack: Attack, model: nn.Module, dataset: ImageDataset, places: Tensor, classes: int) -> None:
    """Refuse images out of the box, what is no classifier of them, and what is random without saying so."""
    tensors = [*model.parameters(), *model.buffers()]
    x = dataset.__getitems__(places[:32].tolist()).image.to(tensors[0].device if tensors else "cpu")
    check_images(x, attack.threat)
    if not first_look(model, x, "logits", classes, attack.seed).repeats:
        raise ValueError(
            f"{type(model).__name__} answers the same images differently when asked again, so what is made could not "
            "be made again: make it a lit_adv.defense.Defense with stochastic = True, or mend what is random"
        )


def arguments(words: Sequence[str]) -> list[str]:
    """A command line in which a file of ``configs/attack`` is replaced by the attack that it names.

    Its target classes and budget are taken over, unless the command line has its own.

    Raises:
        ValueError: the file holds no attack, or settings that an attack set knows nothing of.
    """
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--attack=") else [word])]
    if "--attack" not in words or words.index("--attack") + 1 >= len(words):
        return words
    place = words.index("--attack") + 1
    path = Path(words[place])
    if path.suffix not in (".yaml", ".yml"):
        return words
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}): mend it") from None
    given = content.get("init_args") if isinstance(content, dict) else None
    if not isinstance(given, dict) or "attack" not in given:
        if isinstance(content, dict) and "class_path" in content:
            return words  # the attack itself
        raise ValueError(f"{path} holds no attack: give a file of configs/attack, or a class of lit_adv.attacks")
    unknown = [name for name in ("surrogate", "answers", "confirm", "output", "draws", "access") if name in given]
    if unknown:
        raise ValueError(f"{path} says {', '.join(unknown)}, which an attack set does not take: choose another attack")
    words[place] = json.dumps(given["attack"])
    named = {word.split("=", 1)[0] for word in words}
    for name in ("target", "budget"):
        if given.get(name) is not None and f"--{name}" not in named:
            words += [f"--{name}", str(given[name])]
    return words


def main() -> None:
    """Make adversarial images from the command line."""
    from jsonargparse import auto_cli

    try:
        print(auto_cli(make_attack_set, args=arguments(sys.argv[1:]), as_positional=False))
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
