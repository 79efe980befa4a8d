"""Checkpoints that experiments need: trained if they are missing, gone on with if they were broken off."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_adv.cli import train_main

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = Path("checkpoints")
HOW = ("accelerator", "devices", "precision", "strategy", "num_nodes", "enable_progress_bar", "enable_model_summary")
"""Arguments of the trainer that say how, not what, is trained."""
FINISHED = "finished"
"""File in the folder of a run that came to its end; its state is that of the best epoch, not of the last one."""


def trained(
    name: str, config: str, *overrides: str, folder: Path = CHECKPOINTS, learnt_from: Mapping[str, str] | None = None
) -> Path:
    """The checkpoint of a configuration, trained first if it is missing.

    The configuration and overrides a checkpoint was trained with lie beside it; one of another
    configuration's name or other flags is refused, for a table over mixed settings would say nothing. What stands in
    the files is not compared, and a checkpoint of which nothing is known was put there by hand and is taken.

    Args:
        name: of the checkpoint, and of the run.
        config: file in ``configs/train`` without its ending.
        overrides: flags of ``train.py``, e.g. "--epochs=2"; those that say how, not what, are not noted (``HOW``).
        learnt_from: hashes of what the training reads, by what they are of; noted, too, and compared where the note
            has them.

    Raises:
        FileNotFoundError: there is no such configuration. ValueError: the checkpoint was trained with other settings.
    """
    target, note = folder / f"{name}.ckpt", folder / f"{name}.json"
    wanted: dict[str, Any] = {"config": config, "overrides": _noted(overrides)}
    read = {"learnt_from": dict(learnt_from)} if learnt_from else {}
    if target.exists():
        known = json.loads(note.read_text()) if note.is_file() else wanted
        then = known.pop("learnt_from", {})
        other = sorted(what for what, hash_ in (learnt_from or {}).items() if then.get(what, hash_) != hash_)
        if other:
            raise ValueError(f"{target} learnt from another {', '.join(other)}: move it away to train it anew")
        if known != wanted:
            raise ValueError(
                f"{target} was trained with {known['config']} {' '.join(known['overrides'])}, and wanted is {config} "
                f"{' '.join(wanted['overrides'])}: move it away, or choose another folder"
            )
        _finish(_run(name, config, overrides))
        return target
    begun = time.perf_counter()
    train_main(command(name, config, target, *overrides))
    part = note.with_suffix(".json.part")
    part.write_text(json.dumps(wanted | read) + "\n")
    os.replace(part, note)
    _finish(_run(name, config, overrides))
    print(f"{target} after {(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)
    return target


def command(name: str, config: str, target: Path, *overrides: str) -> list[str]:
    """Arguments of ``train.py`` that train a checkpoint, or go on with it.

    Gone on with is what was broken off: a run that came to its end would only hand out its weights again.

    Raises:
        FileNotFoundError: there is no such configuration.
    """
    path = ROOT / "configs" / "train" / f"{config}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"there is no training {config!r} in {path.parent}: choose one of {known}")
    run = _run(name, config, overrides)
    words = ["fit", "--config", str(path), *overrides, "--name", run.name, "--save_as", str(target)]
    states = [state for state in run.glob("version_*/checkpoints/last.ckpt")
              if not (state.parents[1] / FINISHED).is_file()]  # fmt: skip
    states.sort(key=lambda state: state.stat().st_mtime)
    return [*words, "--ckpt_path", str(states[-1])] if states else words


def _run(name: str, config: str, overrides: Sequence[str]) -> Path:
    """The folder of a training's versions."""
    what = _noted(overrides)
    special = what or config != name  # two configurations under one name must not go on from one another
    return Path("runs", f"{name}_{hashlib.sha256(json.dumps([config, *what]).encode()).hexdigest()[:8]}"
                if special else name)  # fmt: skip


def _finish(run: Path) -> None:
    """Note that all versions of a training that there are have served, so that none is gone on with."""
    for version in run.glob("version_*"):
        (version / FINISHED).touch()


def _noted(overrides: Sequence[str]) -> list[str]:
    """What decides the trained weights: not on which device or in which precision, nor what is shown."""
    return [flag for flag in overrides if not flag.startswith(tuple(f"--trainer.{name}" for name in HOW))]
