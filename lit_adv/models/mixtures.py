"""Mixtures of logistic distributions over levels of a value in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_LOG_SCALE = -7.0  # narrower ones would be points


def log_probability(answer: Tensor, value: Tensor, levels: int) -> Tensor:
    """Log-probability of a level under a mixture of logistics, integrated over the level's interval.

    The lowest and the highest level take the tails, so that the probabilities of all levels sum to 1.

    Args:
        answer: logits of the mixture, means and logarithms of scales, one third of the last dimension each.
        value: in [-1, 1], of the form ``2 k / (levels - 1) - 1``.
        levels: number of levels.

    Shape: (..., 3 m), (...) to (...).

    References:
        Salimans et al. 2017, https://arxiv.org/abs/1701.05517, equations (1) and (2).
    """
    weight, mean, log_scale = answer.chunk(3, -1)
    rate = (-log_scale.clamp_min(LEAST_LOG_SCALE)).exp()
    half = 1 / (levels - 1)
    off = value.unsqueeze(-1) - mean
    upper, lower = (off + half) * rate, (off - half) * rate
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), in which nothing cancels
    inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-2 * half * rate))
    at = value.unsqueeze(-1)
    each = torch.where(at > 1 - half, F.logsigmoid(-lower), inside)
    each = torch.where(at < half - 1, F.logsigmoid(upper), each)
    return torch.logsumexp(each + weight.log_softmax(-1), -1)


def bin_log_probabilities(answer: Tensor, levels: int) -> Tensor:
    """Log-probabilities of all levels: (..., 3 m) to (..., levels)."""
    value = torch.linspace(-1, 1, levels, dtype=answer.dtype, device=answer.device)
    shape = [*answer.shape[:-1], levels]
    return log_probability(answer.unsqueeze(-2), value.expand(shape), levels)
