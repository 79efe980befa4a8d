"""What is learnt from training data, kept in a file and known by the images it stems from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Fitted:
    """Tensors learnt from training images.

    Attributes:
        tensors: what was learnt, by name.
        source: hash of images, labels and settings they stem from.
    """

    tensors: dict[str, Tensor]
    source: str


def fit_or_read(
    path: str | Path | None,
    images: Tensor,
    labels: Tensor | None,
    settings: str,
    learn: Callable[[], dict[str, Tensor]],
) -> Fitted:
    """Read what was learnt from these very images with these settings, or learn it and write it down.

    Args:
        path: of the file; None: nothing is read or written.
        images: training images in their order (N, C, H, W). labels: (N,), where they matter.
        settings: whatever else decides the outcome.
        learn: called where there is nothing to read.

    Raises:
        ValueError: no images, images of another form, or images with NaN or inf.
    """
    if images.dim() != 4 or not images.is_floating_point() or not len(images) or not images.isfinite().all():
        raise ValueError(
            f"images to learn from must be finite floating-point images (N, C, H, W) with N >= 1, got shape "
            f"{tuple(images.shape)} of {images.dtype}"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.is_floating_point()):
        raise ValueError(
            f"labels must hold one class index per image, shape ({len(images)},), got {tuple(labels.shape)}"
        )
    source = _hash(images, labels, settings)
    if path is not None and Path(path).is_file():
        try:
            found = read_fit(path)
        except ValueError:
            found = None  # damaged: made anew
        if found is not None and found.source == source:
            return found
    fitted = Fitted(learn(), source)
    if path is not None:
        _write(Path(path), fitted)
    return fitted


def read_fit(path: str | Path) -> Fitted:
    """What was learnt and written down before.

    Raises:
        ValueError: no such file, or a file of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            source = (file.metadata() or {}).get("source", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"path must be a safetensors file written by fit, got {path} ({error}): leave it out and call "
            "attack.fit(images, labels) with training images"
        ) from None
    return Fitted(tensors, source)


def _write(path: Path, fitted: Fitted) -> None:
    """Whole or not at all: several processes may write the same at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    tensors = {name: value.contiguous().cpu() for name, value in fitted.tensors.items()}
    save_file(tensors, part, metadata={"source": fitted.source})
    os.replace(part, path)


def _hash(images: Tensor, labels: Tensor | None, settings: str) -> str:
    digest = hashlib.blake2b(f"{settings} {tuple(images.shape)} {images.dtype}".encode(), digest_size=8)
    for value in (images, labels):
        if value is not None and value.numel():
            for part in torch.split(value.detach().cpu(), 4096):
                digest.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
