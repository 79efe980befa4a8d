"""Natural evolution strategy: the gradient of a Gaussian smoothing, from antithetic pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.estimator import ProbeEstimator


@dataclass(frozen=True)
class NES(ProbeEstimator):
    """Averages ``(f(x + sigma u) - f(x - sigma u)) u / (2 sigma)`` over Gaussian directions u.

    Args:
        samples: probes of an estimate, an even number: half as many directions.
        sigma: standard deviation of the probes, pixel units.
        momentum: share of the previous estimate in the new one, in [0, 1).
        clip: ``none`` asks the probes as they are, ``box`` and ``ball`` move them inside first.
        block: most probes per image in one forward.

    Raises:
        ValueError: an argument out of its range.
    References:
        Ilyas et al. 2018, https://arxiv.org/abs/1804.08598, algorithm 1; their code averages gradients with a
        momentum of 0.9, samples 50 and sigma 0.001. Wierstra et al. 2014 (natural evolution strategies).
    """

    samples: int = 50
    sigma: float = 1e-3
    momentum: float = 0.0
    clip: Literal["none", "box", "ball"] = "none"
    block: int = 62

    def __post_init__(self) -> None:
        if self.samples < 2 or self.samples % 2:
            raise ValueError(f"samples must be an even number of at least 2 (antithetic pairs), got {self.samples}")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be > 0 in pixel units, got {self.sigma}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.clip not in ("none", "box", "ball") or self.block < 2:
            raise ValueError(f"clip must be none, box or ball and block >= 2, got {self.clip!r} and {self.block}")

    def probes(self, shape: torch.Size) -> int:
        return self.samples

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.momentum else x.new_zeros(len(x), 0)

    def ask(self, x: Tensor, memory: Tensor, draws: Draws, first: Tensor, out: Tensor) -> Tensor:
        directions = draws.normal(out.shape[1] // 2, *x.shape[1:], first=first // 2, dtype=x.dtype)
        x = x.unsqueeze(1)
        torch.add(x, directions, alpha=self.sigma, out=out[:, 0::2])
        torch.sub(x, directions, alpha=self.sigma, out=out[:, 1::2])
        return directions

    def gather(self, told: Tensor, probes: Tensor, values: Tensor, x: Tensor, value: Tensor) -> Tensor:
        slope = (values[:, 0::2] - values[:, 1::2]).nan_to_num(0.0, 0.0, 0.0) / (self.samples * self.sigma)
        with torch.autocast(x.device.type, enabled=False):
            return torch.bmm(slope.to(x.dtype).unsqueeze(1), told.flatten(2)).view_as(x)

    def finish(self, total: Tensor, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        if not self.momentum:
            return total, memory
        mean = self.momentum * memory + (1 - self.momentum) * total
        return mean, mean
