"""What a classifier may answer, and the mode it answers in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Output = Literal["logits", "log_probs", "probs", "labels"]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[bool]:
    """The models in eval mode; each submodule's own mode is restored. Yields whether any was in training mode."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield bool(training)
    finally:
        for module in training:
            module.training = True


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The type of a model's weights, or of its buffers; None where it has neither."""
    return next((t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), None)


def cast(x: Tensor, model: nn.Module) -> Tensor:
    """A copy of the images outside any graph, in half precision for a half-precision model."""
    dtype = dtype_of(model)
    return x.detach().to(dtype) if dtype in (torch.float16, torch.bfloat16) else x.detach().clone()


def check_answer(answer: Any, images: int, output: Output, model: nn.Module) -> None:
    """Refuse what is no answer of a classifier, naming the remedy.

    Raises:
        TypeError: not a tensor. ValueError: wrong shape, NaN, or probabilities where logits are expected.
    """
    name = type(model).__name__
    if not isinstance(answer, Tensor):
        raise TypeError(
            f"{name} must return a tensor of logits (n, K), got {type(answer).__name__}: wrap it in a module that "
            "picks the logits"
        )
    if output == "labels":
        if answer.numel() != images or answer.is_floating_point():
            raise ValueError(
                f"{name} must return one integer label per image where output='labels', got shape "
                f"{tuple(answer.shape)} of {answer.dtype}"
            )
        return
    if answer.dim() != 2 or len(answer) != images or answer.shape[1] < 2:
        raise ValueError(f"{name} must return logits ({images}, K >= 2), got shape {tuple(answer.shape)}")
    answer = answer.detach().float()
    if output == "logits" and images and _are_probabilities(answer):
        raise ValueError(
            f"{name} returns probabilities (each row lies in [0, 1] and sums to 1) where logits are expected: remove "
            "its softmax, or say output='probs'"
        )
    if output == "logits" and images and _are_normalised_twice(answer):
        raise ValueError(f"{name} normalises its answers twice (a log-softmax over probabilities): remove its softmax")


def check_finite(answer: Tensor, model: nn.Module) -> None:
    """Refuse a model that knows no answer but NaN, naming the weights that hold it.

    Raises:
        ValueError: nothing finite in any answer, or none in some and NaN in the weights.
    """
    lost = int((~answer.isfinite().any(-1)).sum())
    if not lost:
        return
    bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if not bad and lost < len(answer):
        return  # single images that break a sound model count as no success
    where = f"its weights hold NaN or inf in {', '.join(bad[:3])}" if bad else "its weights are finite"
    raise ValueError(f"{type(model).__name__} answers {lost} of {len(answer)} images with NaN or inf; {where}")


def label_of(answer: Tensor, output: Output) -> Tensor:
    """Decisions, (n,) int64; -1 where the answer holds NaN."""
    if output == "labels":
        return answer.view(len(answer)).long()
    return answer.argmax(-1).masked_fill(answer.isnan().any(-1), -1)


def _are_probabilities(answer: Tensor) -> bool:
    return bool((answer >= 0).all() and (answer <= 1).all() and ((answer.sum(1) - 1).abs() < 1e-3).all())


def _are_normalised_twice(answer: Tensor) -> bool:
    if not (answer.logsumexp(1).abs() < 1e-3).all():
        return False
    inner = answer + (1 - answer.sum(1, keepdim=True)) / answer.shape[1]  # the probabilities, were there any
    # an unsure log-softmax looks alike; only nearly certain inner probabilities are no coincidence
    return bool(answer.shape[1] > 2 and (inner >= -1e-3).all() and inner.amax(1).mean() > 0.9)
