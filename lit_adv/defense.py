"""A defended classifier, and how it asks to be attacked."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_adv.draws import Draws


class Defense(nn.Module):
    """Maps images in [0, 1] to logits as deployed, and declares what an honest attacker must know.

    A defence knows what in it is random, has no useful gradient, or refuses; it says so here, and every attack
    becomes adaptive by itself. The deployed decision is the argmax of :meth:`forward`.

    Attributes:
        num_classes: number of classes K, without the refusal.
        stochastic: ``forward`` draws fresh random numbers in eval mode too. Then ``forward`` and ``surrogate``
            also take ``draws``, one row per image; without it (training) torch's generator serves.
        reject: index of the refusal column (``num_classes``), for a detector; its value is the largest logit plus
            the detector's margin.
    """

    num_classes: int
    stochastic: bool = False
    reject: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K), or (n, K + 1) with a refusal, of images (n, C, H, W) in [0, 1]."""
        raise TypeError(f"{type(self).__name__} must define forward(x): images (n, C, H, W) to logits (n, K)")

    def surrogate(self, x: Tensor, **draws: Draws) -> Tensor:
        """The same value (if not stochastic) with a useful gradient; see :func:`straight_through`."""
        return self(x, **draws)

    def averaged(self, x: Tensor, answers: int, draws: Draws | None = None) -> Tensor:
        """Log of the mean probabilities of ``answers`` fresh answers to each image: (n, K) or (n, K + 1)."""
        if not self.stochastic:
            return self(x)
        total: Tensor | None = None
        for number in range(answers):
            given = {} if draws is None else {"draws": draws.later(number)}
            answer: Tensor = self(x, **given)
            half = answer.dtype in (torch.float16, torch.bfloat16)
            logs = (answer.float() if half else answer).log_softmax(-1)
            total = logs if total is None else torch.logaddexp(total, logs)
        if total is None:
            raise ValueError(f"answers must be at least 1, got {answers}")
        return total - math.log(answers)


class Undefended(Defense):
    """A plain classifier as a :class:`Defense`: nothing random, nothing refused, its own gradient.

    Args:
        classifier: images (n, C, H, W) in [0, 1] to logits (n, num_classes), normalisation inside.
        num_classes: number of classes.
    """

    def __init__(self, classifier: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """Value of ``exact``, gradient of ``smooth``.

    References:
        Athalye, Carlini & Wagner 2018 (BPDA), https://arxiv.org/abs/1802.00420.
    """
    return exact.detach() + (smooth - smooth.detach())  # in this order nothing is rounded
