"""What an attacker ascends, one value per row: larger is better for the attacker, targeted or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None, int | None], Any]
"""``(scores (n, [s,] K), y (n,), target (n,) or None, reject column or None) -> (n, [s])``, a tensor.

Said to be Any, for a command line would take a class whose instances return tensors for one to make tensors with.
"""


def is_adversarial(label: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """Whether a decision is a win for the attacker.

    Untargeted: neither the true class nor a refusal. Targeted: the target class.

    Shape: ``label`` (n,) or (n, s); ``y`` and ``target`` (n,) -> bool of the shape of ``label``.
    """
    if target is not None:
        return label == _like(target, label)
    won = label != _like(y, label)
    return won if reject is None else won & (label != reject)


def adversarial_samples(
    answer: Tensor,
    y: Tensor,
    target: Tensor | None,
    reject: int | None = None,
    confidence: float = 0.0,
    averaged: bool = False,
) -> Tensor | None:
    """Which of the samples asked about are adversarial, (n, s) bool; None where none is, which is seen at once.

    Args:
        answer: scores (n, [s,] K) or labels (n, [s]); NaN and -1 say nothing.
        confidence: least margin of the scores.
        averaged: the samples are draws of one image, which is judged by their mean probabilities; it counts as the
            last of them.
    """
    scored = answer.is_floating_point()
    if scored and averaged and answer.dim() == 3 and answer.shape[1] > 1:
        mean = answer.log_softmax(-1).logsumexp(1)  # NaN if a draw could not be paid: then nothing is known
        last = adversarial_samples(mean, y, target, reject, confidence)
        return None if last is None else torch.cat([last.new_zeros(len(last), answer.shape[1] - 1), last], 1)
    hit = is_adversarial(answer.argmax(-1) if scored else answer, y, target, reject)
    if not hit.any():
        return None
    hit = hit & (~answer.isnan().any(-1) if scored else answer >= 0)
    if scored and confidence > 0 and hit.any():
        hit &= margin(answer, y, target, reject) >= confidence
    return hit.view(len(hit), -1) if hit.any() else None


def cross_entropy(scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """Cross-entropy of the true class, or minus that of the target; a refusal counts as the true class.

    Written as ``softplus(logsumexp of the others - own)``: equal in value to the usual form, but its gradient does
    not cancel to zero where the network is sure of itself.

    Shape: scores (n, [s,] K) -> (n, [s]).
    """
    if target is not None:
        own, others = _split(scores, target, None)
        return -F.softplus(others.logsumexp(-1) - own.squeeze(-1))
    own, others = _split(scores, y, reject)
    together = own.squeeze(-1) if reject is None else own.logsumexp(-1)
    return F.softplus(others.logsumexp(-1) - together)


def margin(scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """Best wrong class minus the true one (or the refusal, if larger); target minus best other.

    Positive exactly when the attacker has won.

    Shape: scores (n, [s,] K) -> (n, [s]).
    """
    own, others = _split(scores, y if target is None else target, reject if target is None else None)
    gap = others.amax(-1) - own.amax(-1)
    return gap if target is None else -gap


def hinge(scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """The margin cut at 0: once the attacker has won there is nothing more to win.

    Shape: scores (n, [s,] K) -> (n, [s]).
    """
    return margin(scores, y, target, reject).clamp_max(0)


def probability(scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """Minus the probability of the true class, or plus that of the target; a refusal counts as the true class.

    A softmax in float32 is 1 to the last digit where the network is sure: its differences are 0 there, as those of
    :func:`cross_entropy` are not.

    Shape: scores (n, [s,] K) -> (n, [s]).
    """
    shares = scores.softmax(-1)
    if target is not None:
        return _column(shares, target)
    own = _column(shares, y)
    return -own if reject is None else -(own + shares[..., reject])


def rival(scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """The class that a margin is taken against: the best wrong one, or the best other than the target.

    Shape: scores (n, K) -> (n,) int64.
    """
    _, others = _split(scores, y if target is None else target, reject if target is None else None)
    return others.argmax(-1)


def margin_to(
    rival: Tensor, scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None
) -> Tensor:
    """The margin against a class chosen beforehand: finite differences must not change sides between two probes.

    Shape: rival (n,), scores (n, [s,] K) -> (n, [s]).
    References: Bhagoji et al. 2018, https://arxiv.org/abs/1712.09491, section 3.1.3.
    """
    theirs = _column(scores, rival)
    if target is not None:
        return _column(scores, target) - theirs
    own = _column(scores, y)
    return theirs - (own if reject is None else torch.maximum(own, scores[..., reject]))


def dlr(scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """Difference of logits ratio: the margin, free of the logits' shift and scale.

    Untargeted: ``(max other - z_y) / (z_(1) - z_(3))``. Targeted: ``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)``. Of a
    refusal and the true class the larger counts as z_y.

    Raises:
        ValueError: fewer than 3 classes, or 4 if targeted: the ratio does not exist.
    References:
        Croce & Hein 2020, https://arxiv.org/abs/2003.01690, equations (6) and (7).
    """
    needed = 3 if target is None else 4
    if scores.shape[-1] < needed:
        raise ValueError(f"the DLR loss needs at least {needed} classes, got {scores.shape[-1]}: use the margin")
    top = scores.topk(needed, dim=-1).values
    if target is None:
        return margin(scores, y, None, reject) / (top[..., 0] - top[..., 2]).clamp_min(1e-12)
    own = _column(scores, y)
    if reject is not None:  # else nothing would press a refusal down
        own = torch.maximum(own, scores[..., reject])
    gap = _column(scores, target) - own
    return gap / (top[..., 0] - (top[..., 2] + top[..., 3]) / 2).clamp_min(1e-12)


def detector_margin(scores: Tensor, reject: int) -> Tensor:
    """By how much a detector speaks for a refusal: its column less the largest logit, positive where it refuses.

    Shape: scores (n, [s,] K + 1) -> (n, [s]).
    """
    return scores[..., reject] - _without(scores, reject).amax(-1)


def shortfall(
    scores: Tensor,
    y: Tensor,
    target: Tensor | None = None,
    reject: int | None = None,
    kappa: float = 0.0,
    beta: float | None = None,
) -> Tensor:
    """By how much an image falls short of being adversarial with confidence kappa, 0 where it is: to be descended.

    ``max(kappa - margin, 0)``; with ``beta``, and a refusal column whose margin is m, the classes and the detector
    side by side: ``max(kappa - margin of the classes alone, 0) + beta max(m + kappa, 0)``.

    Shape: scores (n, [s,] K) -> (n, [s]).
    References: Carlini & Wagner 2017, https://arxiv.org/abs/1608.04644, f_6; Li et al. 2020, equation (14).
    """
    if beta is None or reject is None:
        return (kappa - margin(scores, y, target, reject)).clamp_min(0)
    fooled = (kappa - margin(_without(scores, reject), y, target)).clamp_min(0)
    return fooled + beta * (detector_margin(scores, reject) + kappa).clamp_min(0)


@dataclass(frozen=True)
class Combined:
    """The classifier's loss and the detector's, side by side: ``L_adv + beta L_det``.

    The attacker ascends the cross-entropy of the classes alone, less ``beta softplus(m)`` of the detector's margin m.
    Without a refusal column it is the cross-entropy.

    Args:
        beta: weight of the detector, >= 0.

    Raises:
        ValueError: a negative weight.
    References:
        Li et al. 2020, "Are L2 adversarial examples intrinsically different?", equation (14).
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(f"beta must be a weight >= 0, got {self.beta}")

    def __call__(self, scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
        if reject is None:
            return cross_entropy(scores, y, target)
        fooled = cross_entropy(_without(scores, reject), y, target)
        return fooled - self.beta * F.softplus(detector_margin(scores, reject))


def _without(scores: Tensor, reject: int) -> Tensor:
    """The scores with the refusal column at minus infinity."""
    return torch.cat(
        [
            scores[..., :reject],
            torch.full_like(scores[..., reject : reject + 1], -torch.inf),
            scores[..., reject + 1 :],
        ],
        -1,
    )


def _like(label: Tensor, shaped: Tensor) -> Tensor:
    return label.view(-1, *[1] * (shaped.dim() - 1))


def _column(scores: Tensor, label: Tensor) -> Tensor:
    place = label.view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1)
    return scores.gather(-1, place).squeeze(-1)


def _split(scores: Tensor, label: Tensor, reject: int | None) -> tuple[Tensor, Tensor]:
    """The scores of the label (and the refusal), and those of all others with the former at minus infinity."""
    place = label.view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1)
    if reject is not None:
        place = torch.cat([place, torch.full_like(place, reject)], -1)
    return scores.gather(-1, place), scores.scatter(-1, place, -torch.inf)
