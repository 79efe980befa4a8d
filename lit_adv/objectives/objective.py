"""What a training loss is: a callable from model and batch to loss and logs."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelledImages(Protocol):
    """A batch: images (n, C, H, W) in [0, 1] and labels (n,)."""

    @property
    def image(self) -> Tensor: ...
    @property
    def label(self) -> Tensor: ...


class Objective(ABC):
    """A training loss.

    Attributes:
        epoch: Epochs trained so far, a fraction within an epoch; the task sets it before every step.
    """

    epoch: float = 0.0

    @abstractmethod
    def __call__(self, model: nn.Module, batch: LabelledImages) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to descend on one batch, and what to log.

        Args:
            model: Network or defence in train mode; left in the mode it came in.
            batch: Images in [0, 1] and their labels.

        Returns:
            The loss, a scalar with gradient, and quantities to log by name: one number per image or a scalar.
        """


def cross_entropy(logits: Tensor, label: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy, in float32 at least, whatever the precision of the logits.

    Shape:
        logits (n, K), label (n,) -> ()
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, label, label_smoothing=label_smoothing)


def correct(logits: Tensor, label: Tensor) -> Tensor:
    """1 where the largest logit is the label's, else 0.

    Shape:
        logits (n, K), label (n,) -> (n,)
    """
    return (logits.detach().argmax(dim=-1) == label).float()
