"""The front door for a notebook: attack a model on some images, get the report."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_adv.attack import Attack
from lit_adv.datamodules import Batch, ImageDataModule
from lit_adv.probes import IMAGES, Probing, outputs, seen_by
from lit_adv.protocol import Protocol
from lit_adv.report import Report
from lit_adv.trial import Trial

Attacks = Attack | Protocol | Sequence[Attack | Protocol] | Mapping[str, Attack | Protocol]


def evaluate(
    model: nn.Module,
    loader: ImageDataModule | Iterable[Any] | tuple[Tensor, Tensor],
    attacks: Attacks,
    budget: int | None = None,
    dirpath: str | Path | None = None,
    max_samples: int | None = None,
    name: str | None = None,
    progress: bool = False,
    audit: bool | int = True,
) -> Report:
    """Attack a model with several attacks; the same records, measures and report as ``evaluate.py``.

    Args:
        model: images (n, C, H, W) in [0, 1] to logits (n, K), on the device where it is to be attacked.
        loader: a data module (its test images), batches of ``(image, label[, index])``, or one pair of tensors.
        attacks: attacks by name, or a list of attacks or :class:`~lit_adv.protocol.Protocol`.
        budget: queries per image, for attacks that bring no protocol of their own.
        dirpath: folder for the records, from which a broken run resumes, and for the report; None: nothing is written.
        max_samples: most images that any attack looks at; None: as the protocols say, else all.
        name: of the model in the report; default its class.
        progress: whether to show a bar per attack.
        audit: whether to probe if the figures can be believed, see docs/audit.md; a number: on so many images, right at
            first, instead of 64. Costs up to 200 gradients an image. False: the report tells what records alone tell.

    Returns:
        The report: print it, look at ``report.outcomes``, or ``report.write(folder)``.

    Raises:
        ValueError: no attack, or input that no attack can work on.
    """
    protocols = [_limited(protocol, max_samples) for protocol in _protocols(attacks, budget)]
    folder = None if dirpath is None else Path(dirpath)
    data = loader.name if isinstance(loader, ImageDataModule) else ""
    classes = loader.num_classes if isinstance(loader, ImageDataModule) else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # what is wrong with it is told before the work, not after
    records = None if folder is None else folder / "attacks"
    training = None
    if isinstance(loader, ImageDataModule):
        loader.prepare_data()
        training = loader.training_images
    trials = [
        Trial(protocol, model, data, classes, records, progress=progress, place=place, training=training)
        for place, protocol in enumerate(protocols)
    ]
    probing = None
    if images := IMAGES if audit is True else int(audit):
        kept = None if folder is None else folder / "audit"
        probing = Probing(model, images, seen_by(protocols), outputs(protocols), data, kept, progress)
    _show(model, loader, trials, probing)
    outcomes = [trial.outcome(trial.close()) for trial in trials]
    probed = [] if probing is None else probing.audited(outcomes, [p.attack.threat for p in protocols])
    report = Report(outcomes, name or type(model).__name__, data or "images given", versions(), probed)
    if folder is not None:
        try:
            report.write(folder)
        except OSError as error:
            warnings.warn(f"{error}; the report is returned all the same", stacklevel=2)
    return report


def _show(model: nn.Module, loader: Any, trials: Sequence[Trial], probing: Probing | None) -> None:
    """Give all of them the images, as long as one of the trials wants more."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in _batches(loader):
        moved = Batch(*(part.to(device) for part in batch))
        for trial in trials:
            trial.add(moved)
        if probing is not None:
            probing.add(moved)
        if all(trial.full for trial in trials):
            return


def versions() -> dict[str, str]:
    """Date and versions, for a reader of the report."""
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "torchvision", "pytorch-lightning")}
    from lit_adv import __version__

    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "lit_adv": __version__, **packages}


def _limited(protocol: Protocol, most: int | None) -> Protocol:
    own = protocol.max_samples
    return protocol if most is None or (own is not None and own <= most) else replace(protocol, max_samples=most)


def _protocols(attacks: Attacks, budget: int | None) -> list[Protocol]:
    if isinstance(attacks, type):
        raise TypeError(
            f"attacks holds the class {attacks.__name__}, not an attack: call it, as in {attacks.__name__}()"
        )
    if isinstance(attacks, Attack | Protocol):
        attacks = [attacks]
    if not attacks:
        raise ValueError("attacks is empty: give at least one, e.g. [PGD()]")
    if isinstance(attacks, Mapping):
        return [_protocol(attack, name, budget) for name, attack in attacks.items()]
    given = [attack.name for attack in attacks if isinstance(attack, Protocol)]
    if len(set(given)) < len(given):
        raise ValueError(f"every protocol needs a name of its own, got {', '.join(given)}")
    taken = set(given)
    found: list[Protocol] = []
    for attack in attacks:
        if isinstance(attack, Protocol):
            found.append(attack)
            continue
        plain = type(attack).__name__.lower()
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain([plain], numbered) if name not in taken)
        taken.add(name)
        found.append(_protocol(attack, name, budget))
    return found


def _protocol(attack: Attack | Protocol, name: str, budget: int | None) -> Protocol:
    if isinstance(attack, Protocol):
        return replace(attack, name=name)
    if not isinstance(attack, Attack):
        raise TypeError(f"attacks must be attacks of lit_adv.attacks or protocols, got {type(attack).__name__}")
    return Protocol(name=name, attack=attack, budget=budget)


def _batches(loader: ImageDataModule | Iterable[Any] | tuple[Tensor, Tensor]) -> Iterator[Batch]:
    """Batches with places in the data set; where the loader gives none they are counted."""
    if isinstance(loader, ImageDataModule):
        loader.setup("test")
        loader = loader.test_dataloader()
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[0], Tensor):
        loader = [loader]
    seen = 0
    for batch in loader:
        if isinstance(batch, Batch):
            yield batch
        elif isinstance(batch, list | tuple) and len(batch) in (2, 3) and all(isinstance(p, Tensor) for p in batch):
            image, label, *rest = batch
            yield Batch(image, label, rest[0] if rest else torch.arange(seen, seen + len(image)))
        else:
            raise TypeError(
                f"a loader must yield (image, label) or (image, label, index) tensors, got {type(batch).__name__}"
            )
        seen += len(batch[0])
