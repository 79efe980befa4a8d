"""Attacks by the names of their files in ``configs/attack/``, for experiments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from lit_adv.callbacks import AttackEvaluation
from lit_adv.cli import keep_memory
from lit_adv.protocol import Protocol

ATTACKS = Path(__file__).resolve().parents[2] / "configs" / "attack"


def protocol_of(config: str, name: str | None = None, attack: dict[str, Any] | None = None, **changes: Any) -> Protocol:
    """The protocol of an attack's file.

    Args:
        config: the file's name without its ending. name: instead of the file's own, where one file serves twice.
        attack: arguments of the attack to be changed. changes: of the protocol, budget or max_samples say.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = ATTACKS / f"{config}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in ATTACKS.glob("*.yaml")))
        raise FileNotFoundError(f"there is no attack {config!r} in {ATTACKS}: choose one of {known}")
    tree = yaml.safe_load(path.read_text())
    tree["init_args"]["attack"].setdefault("init_args", {}).update(attack or {})
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=AttackEvaluation)
    protocol: Protocol = parser.instantiate(parser.parse_object({"callback": tree})).callback.protocol
    return replace(protocol, **changes) if name is None else replace(protocol, name=name, **changes)


def command_line(
    parser: argparse.ArgumentParser, attacks: Sequence[str], models: Sequence[str], folder: Path
) -> argparse.Namespace:
    """Parse the flags of a table of attacks on several models, and set up the process.

    Args:
        parser: holds the table's own flags. attacks, models: names to choose from. folder: of records and table.

    Returns:
        The flags; ``only`` are the names of the attacks chosen.
    """
    add = parser.add_argument
    add("--models", nargs="+", default=list(models), choices=list(models), help="models to attack")
    add("--only", nargs="+", default=None, metavar="NAME", help="attacks whose name holds one of these")
    add("--train", nargs="*", default=[], metavar="FLAG", help="flags of train.py, e.g. epochs=1")
    add("--checkpoints", type=Path, default=Path("checkpoints"), help="where the models lie")
    add("--folder", type=Path, default=folder, help="records and table")
    add("--threads", type=int, default=1, help="threads of the processor")
    given = parser.parse_args()
    chosen = [name for name in attacks if given.only is None or any(part in name for part in given.only)]
    if not chosen:
        parser.error(f"no attack is called {' or '.join(given.only)}: {', '.join(attacks)}")
    given.only = chosen
    keep_memory()
    torch.set_num_threads(given.threads)
    return given
