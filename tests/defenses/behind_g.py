"""Tiny networks f_a and f_b for tests of adversarial transformation, and g written as a plain loop over one image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from contracts.nets import SHAPE, Linear, Small
from torch import Tensor, nn

from lit_adv.defenses import AdversarialTransformation
from lit_adv.draws import Draws

CLASSES = 4
DELTA = 0.2


def linear_reference(shape: tuple[int, ...] = SHAPE, classes: int = CLASSES, seed: int = 6) -> Linear:
    """A linear f_b whose scores are of order 1, so that no class has all of the probability."""
    network = Linear(classes, shape, seed)
    with torch.no_grad():
        network.weight /= torch.Size(shape).numel() ** 0.5
        network.bias -= network.weight.sum(1) / 2
    return network


def defended(
    reference: nn.Module | list[nn.Module] | None = None, shape: tuple[int, ...] = SHAPE, **settings: Any
) -> AdversarialTransformation:
    """A smooth f_a behind g, in float64 and eval mode."""
    reference = linear_reference(shape) if reference is None else reference
    settings = {"delta": DELTA, "num_classes": CLASSES, **settings}
    return AdversarialTransformation(Small(CLASSES, shape), reference, **settings).eval()


def keyed(count: int, seed: int = 0, step: int = 0, first: int = 0) -> Draws:
    """The draws of images ``first`` to ``first + count``."""
    return Draws(seed, torch.arange(first, first + count), torch.full((count,), step))


class Loop:
    """g of one image in numpy, on a linear f_b, whose gradients are known in closed form.

    The gradient of the cross-entropy -log p_t of softmax(W x + b) is W' (p - e_t).
    """

    def __init__(self, network: Linear, delta: float, steps: int, step_size: float, norm: str, box: bool) -> None:
        self.weight, self.bias = network.weight.detach().numpy(), network.bias.detach().numpy()
        self.delta, self.steps, self.step_size, self.norm, self.box = delta, steps, step_size, norm, box

    def scores(self, x: np.ndarray) -> np.ndarray:
        return self.weight @ x.ravel() + self.bias

    def loss(self, x: np.ndarray, target: int) -> float:
        scores = self.scores(x)
        return float(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target])

    def run(self, x: np.ndarray, start: np.ndarray, target: int, ascend: bool = False) -> np.ndarray:
        """The image after all steps from ``x + start``, towards the class ``target`` (or away from it)."""
        moved = x + start
        for _ in range(self.steps):
            scores = self.scores(moved)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            shares[target] -= 1
            slope = (shares @ self.weight).reshape(x.shape)
            direction = np.sign(slope) if self.norm == "linf" else slope / np.sqrt((slope**2).sum())
            moved = moved + self.step_size * direction if ascend else moved - self.step_size * direction
            moved = self.projected(moved, x)
        return moved

    def projected(self, moved: np.ndarray, x: np.ndarray) -> np.ndarray:
        if self.norm == "linf":
            moved = np.minimum(np.maximum(moved, x - self.delta), x + self.delta)
        else:
            length = np.sqrt(((moved - x) ** 2).sum())
            moved = x + (moved - x) * min(1.0, self.delta / length) if length > 0 else moved
        return np.clip(moved, 0, 1) if self.box else moved


class Counted(nn.Module):
    """Counts forwards and backward passes of a network, and keeps the images it is given."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.given, self.backwards = network, list[Tensor](), 0

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        scores: Tensor = self.network(x)
        if scores.requires_grad:
            scores.register_hook(self._count)
        return scores

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1

    @property
    def forwards(self) -> int:
        return len(self.given)
