"""Training of detectors: clean images and their adversarial counterparts, told apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.detector import NetworkDetector
from lit_adv.kept import KeptByPlace
from lit_adv.objectives.objective import Objective
from lit_adv.response import answered


class PairDetection(Objective):
    """Cross-entropy of a detector on pairs: clean images are class 0, adversarial ones class 1, as many of each.

    Args:
        keep: compute what the detector looks at once per pair and keep it: the classifier is frozen, and the images
            are not augmented. At most 2 GiB are kept.

    References:
        Li et al. 2020, "Are L2 adversarial examples intrinsically different?", section 3.1.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self._kept = KeptByPlace()

    def forget(self) -> None:
        """Drop what was kept: other pairs, another classifier or another scale follow."""
        self._kept = KeptByPlace()

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(model, NetworkDetector):
            raise ValueError(
                f"model must be a detector with a network, as lit_adv.detectors.ImageDetector, got "
                f"{type(model).__name__}"
            )
        views = paired_views(model, batch, self._kept if self.keep else None)
        scores = answered(model.network, views.flatten(0, 1)).float().reshape(*views.shape[:2], 2)
        return pair_loss(scores).mean(), {"accuracy": told_apart(scores)}


def paired_views(model: NetworkDetector, batch: Any, kept: KeptByPlace | None) -> Tensor:
    """What a detector looks at of pairs, (n, 2, ...): clean, adversarial; without a graph.

    Args:
        batch: pairs with ``image``, ``x_adv`` and ``place``.
    """

    def compute(rows: Tensor) -> Tensor:
        views = [model.view(model.respond(x[rows])) for x in (batch.image, batch.x_adv)]
        return torch.stack(views, 1).detach()

    if kept is None:
        return compute(torch.arange(len(batch.place), device=batch.place.device))
    return kept(batch.place, compute)


def pair_loss(scores: Tensor) -> Tensor:
    """Mean cross-entropy of both members of each pair.

    Shape: (n, 2, 2), the pair's members and the two logits, to (n,).
    """
    truth = torch.arange(2, device=scores.device).expand(len(scores), 2)
    return F.cross_entropy(scores.flatten(0, 1), truth.flatten(), reduction="none").view(-1, 2).mean(1)


def told_apart(scores: Tensor) -> Tensor:
    """Share of both members of each pair that is judged rightly, (n, 2, 2) to (n,)."""
    margin = (scores[..., 1] - scores[..., 0]).detach()
    return ((margin[:, 0] <= 0).float() + (margin[:, 1] > 0).float()) / 2
