"""The rungs between the query-limited attack and NAttack, each against one plain loop with a switch per rung."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from contracts.nets import Small, decided, images
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.experiments.ladder import RELEASED, Setting, rungs
from lit_adv.threat import ThreatModel

SETTING = Setting(ThreatModel("linf", 0.06), budget=60, directions=6, step_size=0.02, sigma=0.05, shrink=0.01)


@dataclass(frozen=True)
class Switches:
    """What the columns of the paper's table 2 turn on, one after the other."""

    clip: bool = False
    hinge: bool = False
    sign: bool = True
    box: bool = True
    tanh: bool = False
    zscore: bool = False
    antithetic: bool = True
    released: bool = False
    sigma: float = SETTING.sigma


QL = Switches()
CLIP = replace(QL, clip=True)
LOSS = replace(CLIP, hinge=True)
FREE = replace(LOSS, sign=False, box=False)
TANH = replace(FREE, tanh=True)
SCORED = replace(TANH, zscore=True)
SINGLE = replace(SCORED, antithetic=False)
COLUMNS = {
    "QL": QL,
    "+CLIP": CLIP,
    "+loss": LOSS,
    "-PGD": FREE,
    "+tanh": TANH,
    "+zscore": SCORED,
    "NATTACK": SINGLE,
    "QL+tanh+CLIP": replace(QL, clip=True, tanh=True, box=False),
    "QL, its own sigma": replace(QL, sigma=1e-3),
    RELEASED: replace(SINGLE, released=True),
}


def climbed(model: Small, x0: Tensor, y: Tensor, on: Switches, steps: int) -> Tensor:
    """The tested image after some steps of losses that are minimised (no early stop, no plateau so soon)."""
    eps, n = SETTING.threat.radius, SETTING.directions
    origin = torch.atanh((1 - SETTING.shrink) * (2 * x0 - 1)) if on.tanh else x0

    def image(state: Tensor) -> Tensor:
        return 0.5 * (state.tanh() + 1) if on.tanh else state

    def clipped(x: Tensor) -> Tensor:
        return (x0 + (x - x0).clamp(-eps, eps)).clamp(0, 1)

    def losses(asked: list[Tensor]) -> Tensor:
        values, first = [], None
        for x in asked:
            logs = model(x).log_softmax(-1)
            own = logs.gather(1, y[:, None]).squeeze(1)
            other = logs.scatter(1, y[:, None], -math.inf).amax(1)
            first = other if first is None else first
            values.append((own - (first if on.released else other)).clamp_min(0) if on.hinge else own)
        return torch.stack(values, 1)

    state = origin
    for step in range(steps):
        u = Draws(0, torch.arange(len(x0)), torch.full((len(x0),), step)).normal(
            n, *x0.shape[1:], first=torch.zeros(len(x0), dtype=torch.int64), dtype=torch.float64
        )
        if on.antithetic:
            u = torch.stack([u, -u], 2).flatten(1, 2)
        asked = [image(state + on.sigma * u[:, i]) for i in range(u.shape[1])]
        values = losses([clipped(x) for x in asked] if on.clip else asked)
        if on.zscore:
            values = (values - values.mean(1, keepdim=True)) / (values.std(1, correction=0, keepdim=True) + 1e-7)
        g = (values[:, :, None, None, None] * u).sum(1) / (u.shape[1] * on.sigma)
        state = state - SETTING.step_size * (g.sign() if on.sign else g)
        if on.box:
            state = clipped(state)
    return clipped(image(state))


@pytest.mark.parametrize("name", COLUMNS)
def test_every_rung_is_the_plain_loop_with_its_switches(name: str) -> None:
    x0 = 0.05 + 0.9 * images(3)
    model = Small().requires_grad_(False)
    y = decided(model, x0)
    attack = rungs(SETTING)[name]
    for steps in (1, 4):
        attack.steps = steps  # type: ignore[attr-defined]
        found = attack.perturb(model, x0, y, index=torch.arange(3))  # type: ignore[attr-defined]
        expected = climbed(model, x0, y, COLUMNS[name], steps)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert (found - x0).abs().max() > 1e-4


def test_neighbouring_rungs_differ() -> None:
    x0 = 0.05 + 0.9 * images(3)
    model = Small().requires_grad_(False)
    y = decided(model, x0)
    ends = [climbed(model, x0, y, on, 4) for on in COLUMNS.values()]
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert (one - other).abs().max() > 1e-6
