"""What a defence made of several networks refuses: other classes, and images that are none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def class_count(classifier: nn.Module, references: Sequence[nn.Module], num_classes: int | None) -> int:
    """The number of classes that all agree on."""
    said = {
        "num_classes": num_classes,
        "classifier": getattr(classifier, "num_classes", None),
        **{f"reference {place}": getattr(network, "num_classes", None) for place, network in enumerate(references)},
    }
    known = {name: int(count) for name, count in said.items() if count is not None}
    if not known:
        raise ValueError("neither classifier nor reference says how many classes it knows: give num_classes")
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in known.items())
        raise ValueError(f"f_a and f_b must know the same classes, got {listed}: take networks of the same data")
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
