"""Simultaneous perturbation: the slope along a random direction, spread over all coordinates at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.estimator import ProbeEstimator


@dataclass(frozen=True)
class SPSA(ProbeEstimator):
    """Averages ``(f(x + delta r) - f(x - delta r)) / (2 delta)``, divided by r element by element, over directions r.

    ``gaussian`` directions have unit l2 norm, as in the code of Bhagoji et al.; ``signs`` are +-1 in every coordinate,
    as in Spall's original, where dividing and multiplying are the same. Both spread one slope over all coordinates
    with the signs of the direction. ``multiply`` is unbiased on a linear function (Gaussian directions: times the
    number of coordinates, since each holds but a share of the length); a division by Gaussian numbers is ruled by
    those near 0 and has no mean, so it suits one direction and the sign steps of linf alone.

    Args:
        directions: averaged per estimate, two probes each.
        delta: half the distance of two probes: along a ``gaussian`` direction in l2, in every pixel for ``signs``.
        direction: ``gaussian`` or ``signs``.
        spread: ``divide`` by the direction or ``multiply`` with it.
        clip: ``box`` and ``ball`` move probes inside first (the divisor stays 2 delta), ``none`` leaves them.
        block: most probes per image in one forward.

    Raises:
        ValueError: an argument out of its range.
    References:
        Spall 1992, https://doi.org/10.1109/9.119632, equation (2.2); Bhagoji et al. 2018,
        https://arxiv.org/abs/1712.09491, appendix, whose code clips probes to the box and has delta 0.01 and
        1 direction per step; Uesato et al. 2018, https://arxiv.org/abs/1802.05666 (averages over many).
    """

    directions: int = 1
    delta: float = 0.01
    direction: Literal["gaussian", "signs"] = "gaussian"
    spread: Literal["divide", "multiply"] = "divide"
    clip: Literal["none", "box", "ball"] = "box"
    block: int = 62

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ValueError(f"directions must be at least 1, got {self.directions}")
        if not self.delta > 0:
            raise ValueError(f"delta must be > 0 in pixel units, got {self.delta}")
        if self.block < 2:
            raise ValueError(f"block must hold a pair of probes at least, 2, got {self.block}")
        directions, spreads = ("gaussian", "signs"), ("divide", "multiply")
        choices = {"direction": directions, "spread": spreads, "clip": ("none", "box", "ball")}
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} must be one of {', '.join(legal)}, got {getattr(self, name)!r}")

    def probes(self, shape: torch.Size) -> int:
        return 2 * self.directions

    def ask(self, x: Tensor, memory: Tensor, draws: Draws, first: Tensor, out: Tensor) -> Tensor:
        pairs, pixels = out.shape[1] // 2, x.shape[1:]
        if self.direction == "signs":
            r = draws.signs(pairs, *pixels, first=first // 2, dtype=x.dtype)
        else:
            r = draws.normal(pairs, *pixels, first=first // 2, dtype=x.dtype)
            r /= r.flatten(2).norm(dim=2).clamp_min(torch.finfo(r.dtype).tiny)[:, :, None, None, None]
        x = x.unsqueeze(1)
        torch.add(x, r, alpha=self.delta, out=out[:, 0::2])
        torch.sub(x, r, alpha=self.delta, out=out[:, 1::2])
        return r

    def gather(self, told: Tensor, probes: Tensor, values: Tensor, x: Tensor, value: Tensor) -> Tensor:
        slope = (values[:, 0::2] - values[:, 1::2]).nan_to_num(0.0, 0.0, 0.0) / (2 * self.delta * self.directions)
        r = told.flatten(2)
        if self.direction == "gaussian" and self.spread == "divide":
            r = torch.where(r == 0, 0.0, 1 / r)
        elif self.direction == "gaussian":
            slope *= r.shape[2]
        with torch.autocast(x.device.type, enabled=False):
            return torch.bmm(slope.to(x.dtype).unsqueeze(1), r).view_as(x)
