"""The gradient from automatic differentiation, averaged over a random model's draws if asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.estimator import GradientEstimator, RowFunction


@dataclass(frozen=True)
class Autograd(GradientEstimator):
    """White-box gradient; BPDA and EOT arise from it and from what the defence declares.

    Args:
        eot: number of fresh draws of a random model over which the gradient is averaged (expectation over
            transformation); each draw is a query. None: 1, or 20 where an attack is on a model that says that it is
            random (in training 1).

    Raises:
        ValueError: ``eot`` below 1.
    References:
        Athalye et al. 2018, https://arxiv.org/abs/1707.07397 (EOT).
    """

    eot: int | None = None
    needs_gradient = True

    def __post_init__(self) -> None:
        if self.eot is not None and self.eot < 1:
            raise ValueError(f"eot must be at least 1 draw, got {self.eot}")

    def cost(self, shape: torch.Size) -> int:
        return self.eot or 1

    def __call__(
        self, f: RowFunction, x: Tensor, memory: Tensor, draws: Draws, box: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = f(leaf) if self.cost(x.shape[1:]) == 1 else f(_repeat(leaf, self.cost(x.shape[1:]))).mean(1)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)  # rows are independent: the sum is not across rows
        return value.detach(), gradient, memory


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.unsqueeze(1).expand(len(x), times, *x.shape[1:])
