"""A second, independent look at what attacks return: only what passes it counts as a success."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_adv.answers import Output, cast, check_answer, evaluating, label_of
from lit_adv.draws import Draws
from lit_adv.losses import is_adversarial
from lit_adv.threat import ThreatModel

_VERIFYING, _ROUNDING, _CLEAN = -2, -3, -4  # keys that no attack's query uses


@dataclass(frozen=True)
class Verification:
    """What the deployed model says of returned images, one row per image.

    Attributes:
        verified: (n,) bool: finite, in box and ball, and adversarial in more than half of the fresh draws.
        any: (n,) bool: adversarial in any of them, other conditions as above.
        mean: (n,) float64: share of the draws in which it is adversarial, 0 where the image is invalid.
        rounded: (n,) bool: as ``verified``, after rounding to 8 bits (inside the ball where the grid allows it).
        label: (n,) int64: the majority's decision on the returned image.
    """

    verified: Tensor
    any: Tensor
    mean: Tensor
    rounded: Tensor
    label: Tensor


def verify(
    model: nn.Module,
    threat: ThreatModel,
    x_adv: Tensor,
    x0: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    draws: int | None = None,
    index: Tensor | None = None,
    seed: int = 0,
    chunk: int = 256,
    output: Output = "logits",
) -> Verification:
    """Judge returned images by the bare deployed model, with fresh random numbers and arithmetic of its own.

    Nothing here is charged to the attacker. Distances are taken in float64.

    Args:
        draws: fresh decisions per image; None: 1, or 30 where the model is stochastic.
        index: places in the data set, which key a random model's draws; default ``arange(n)``.

    Shape: x_adv and x0 (n, C, H, W), y and target (n,).
    """
    reject: int | None = getattr(model, "reject", None)
    valid = threat.within(x_adv.double(), x0.double(), dtype=x_adv.dtype)
    safe = torch.where(valid[:, None, None, None], x_adv, x0)
    labels = fresh_labels(model, safe, draws, index, seed, chunk, output, key=_VERIFYING)
    won = is_adversarial(labels, y, target, reject) & (labels >= 0) & valid[:, None]
    rounded = threat.quantize(safe, x0)
    again = fresh_labels(model, rounded, draws, index, seed, chunk, output, key=_ROUNDING)
    survived = is_adversarial(again, y, target, reject) & (again >= 0) & valid[:, None]
    near = (rounded - x0).flatten(1).abs().amax(1) <= (x_adv - x0).flatten(1).abs().amax(1) + 1 / 255
    share = won.double().mean(1)
    return Verification(
        verified=share > 0.5,
        any=won.any(1),
        mean=share,
        rounded=(survived.double().mean(1) > 0.5) & near,
        label=labels.mode(1).values,
    )


def correct(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    draws: int | None = None,
    index: Tensor | None = None,
    seed: int = 0,
    chunk: int = 256,
    output: Output = "logits",
) -> Tensor:
    """Whether the model is right about clean images by the same majority of fresh draws, (n,) bool."""
    labels = fresh_labels(model, x, draws, index, seed, chunk, output, key=_CLEAN)
    return (labels == y[:, None]).double().mean(1) > 0.5


def fresh_labels(
    model: nn.Module,
    x: Tensor,
    draws: int | None = None,
    index: Tensor | None = None,
    seed: int = 0,
    chunk: int = 256,
    output: Output = "logits",
    key: int = _VERIFYING,
) -> Tensor:
    """Decisions of the deployed model, (n, draws) int64; -1 where the answer is not finite."""
    stochastic = bool(getattr(model, "stochastic", False))
    times = draws if draws is not None else (30 if stochastic else 1)
    if times < 1:
        raise ValueError(f"draws must be at least 1, got {times}")
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device).clone()
        labels = torch.empty(len(x), times, dtype=torch.int64, device=x.device)
        for number in range(times):
            if number and not stochastic:
                labels[:, number] = labels[:, 0]
                continue
            for begin in range(0, len(x), chunk):
                part = torch.arange(begin, min(begin + chunk, len(x)), device=x.device)
                step = torch.full_like(part, number)
                given = {"draws": Draws(seed, index[part], step, key)} if stochastic else {}
                labels[part, number] = _decide(model(cast(x[part], model), **given), len(part), output, model)
    return labels


def _decide(answer: Tensor, images: int, output: Output, model: nn.Module) -> Tensor:
    check_answer(answer, images, output, model)
    return label_of(answer, output)
