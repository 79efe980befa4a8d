"""Attacks by the names of their files in ``configs/attack/``, for experiments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lit_adv.callbacks import AttackEvaluation
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
