"""A classifier of digits, and attack sets made of it in small pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_adv.attack_set import Made, make_attack_set
from lit_adv.attacks import DDN, PGD
from lit_adv.datamodules import Digits
from lit_adv.datamodules.attacked import attacked_pools
from lit_adv.threat import ThreatModel

IMAGES, POOL = 22, 8
DATA = Digits(max_train=100)


class Linear(nn.Module):
    """A classifier of digits by ridge regression, wrong for some images."""

    def __init__(self) -> None:
        super().__init__()
        batch = Digits().training_images(300)
        pixels = batch.image.flatten(1).double() - 0.5
        codes = torch.nn.functional.one_hot(batch.label, 10).double() - 0.1
        ridge = pixels.T @ pixels + 20 * torch.eye(64, dtype=torch.float64)
        self.weight = nn.Parameter(8 * torch.linalg.solve(ridge, pixels.T @ codes).T.float())

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


MODEL = Linear().eval()


def fgsm(eps: float = 0.1) -> PGD:
    return PGD(ThreatModel("linf", eps), steps=1, step_size=eps or 1.0, random_start=False)


def ddn(**changes: Any) -> DDN:
    return DDN(**{"steps": 8, **changes})


def make(folder: Path, images: int = IMAGES, **changes: Any) -> Made:
    given: dict[str, Any] = {"attack": fgsm(), "model": MODEL, "data": DATA, "pool": POOL, **changes}
    return make_attack_set(folder=folder, images=images, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def read(folder: Path) -> dict[str, Tensor]:
    return attacked_pools(folder).read()[1]


def decided(x: Tensor) -> Tensor:
    with torch.no_grad():
        return MODEL(x).argmax(1)
