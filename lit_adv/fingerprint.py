"""What a network's weights and settings hash to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(state: Mapping[str, Tensor], settings: object) -> Tensor:
    """SHA-256 of weights by name and of settings, (32,) uint8 on the CPU.

    Floating-point weights count as float32, so that a network and its copy in half precision read from one file agree.

    Args:
        settings: anything whose ``repr`` says all that matters of it.
    """
    found = hashlib.sha256(repr(settings).encode())
    for name, value in state.items():
        plain = value.detach().cpu()
        plain = plain.float() if plain.is_floating_point() else plain
        found.update(f"{name} {tuple(plain.shape)}".encode())
        found.update(plain.contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)
