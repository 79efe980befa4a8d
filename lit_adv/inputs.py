"""How a defence made of several networks takes its images: what it refuses, and in which precision it works."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def class_count(
    classifier: nn.Module, others: Sequence[nn.Module], num_classes: int | None, called: str = "reference"
) -> int:
    """The number of classes that all agree on."""
    said = {
        "num_classes": num_classes,
        "classifier": getattr(classifier, "num_classes", None),
        **{f"{called} {place}": getattr(network, "num_classes", None) for place, network in enumerate(others)},
    }
    known = {name: int(count) for name, count in said.items() if count is not None}
    if not known:
        raise ValueError(f"neither classifier nor {called} says how many classes it knows: give num_classes")
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in known.items())
        raise ValueError(f"the networks must know the same classes, got {listed}: take networks of the same data")
    return next(iter(known.values()))


def check_images(x: Tensor) -> None:
    """Refuse what is no batch of images in or near [0, 1]."""
    if not x.is_floating_point():
        raise TypeError(f"images must be floating-point in [0, 1], got {x.dtype}: divide uint8 by 255")
    if x.dim() != 4:
        raise ValueError(f"images must be (n, C, H, W), got shape {tuple(x.shape)}")
    if not len(x):
        return
    least, most = (float(end) for end in torch.aminmax(x.detach()))
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError("images hold NaN or inf: leave them out or mend what makes them")
    if least < -1 or most > 2:
        raise ValueError(
            f"images must lie in [0, 1], got values in [{least:.3g}, {most:.3g}]: put the normalisation inside the "
            "networks, and divide 8-bit images by 255"
        )


def wide(x: Tensor) -> Tensor:
    """Images in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextmanager
def precise(x: Tensor) -> Iterator[None]:
    """Gradients on, inference mode and autocast off: in half precision the sign of a vanished gradient is 0."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        yield
