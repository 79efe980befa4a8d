"""Where attacks may begin: random points of the ball."""

from __future__ import annotations

from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.threat import ThreatModel


def random_point(threat: ThreatModel, x0: Tensor, draws: Draws) -> Tensor:
    """A uniform random point of the ball around each image, moved into the box: (n, C, H, W).

    linf: uniform in the cube. l2: a uniform direction, the radius distributed as in the ball. Elsewhere, and in an
    unbounded ball, the clean image.
    """
    if threat.radius in (0, float("inf")):
        return x0
    if threat.norm == "linf":
        noise = draws.uniform(*x0.shape[1:], low=-threat.radius, high=threat.radius, dtype=x0.dtype)
    elif threat.norm == "l2":
        noise = draws.normal(*x0.shape[1:], dtype=x0.dtype)
        length = draws.uniform(dtype=x0.dtype) ** (1 / noise[0].numel() if len(noise) else 1)
        noise = noise / noise.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
        noise = noise * (threat.radius * length)[:, None, None, None]
    else:
        return x0
    return threat.project(x0 + noise, x0)
