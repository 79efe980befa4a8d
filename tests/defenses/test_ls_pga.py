"""LS-PGA against a plain loop over one image, its mask and its images against brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contracts.nets import Coded, Small, counting, images
from torch import Tensor, nn

from lit_adv.attack import AttackResult, Search
from lit_adv.defenses import LSPGA, Thermometer
from lit_adv.defenses.thermometer import LSPGAState, bucket
from lit_adv.oracle import Access, AccessDenied, QueryOracle
from lit_adv.threat import ThreatModel

SHAPE = (3, 4, 4)


class Hidden(nn.Module):
    """One hidden layer on codes, float64 unless cast."""

    num_classes = 4

    def __init__(self, size: int, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(12, size, generator=generator, dtype=torch.float64) / size**0.5)
        self.second = nn.Parameter(scale * torch.randn(4, 12, generator=generator, dtype=torch.float64))

    def forward(self, code: Tensor) -> Tensor:
        return (code.flatten(1) @ self.first.T).tanh() @ self.second.T


def problem(count: int = 6, levels: int = 16, code: Any = "thermometer") -> tuple[Thermometer, Tensor, Tensor]:
    model, x = Thermometer(Hidden(48 * levels), levels, code, 3).eval(), images(count, 2, SHAPE)
    x.view(count, -1)[:, :2] = torch.tensor([0.0, 1.0], dtype=x.dtype)
    return model, x, model(x).argmax(1)


def by_hand(model: Thermometer, x: Tensor, y: int, attack: LSPGA) -> list[Tensor]:
    """The images of all steps of one image (C, H, W), from u = 0, pixel by pixel."""
    levels, eps = model.levels, attack.threat.radius
    pixels = x.flatten().tolist()
    reached = []
    for value in pixels:
        low, high = max(0.0, value - eps), min(1.0, value + eps)
        reached.append(range(math.floor(0.99999 * low * levels), math.floor(0.99999 * high * levels) + 1))
    u = [[0.0] * len(levels_of) for levels_of in reached]
    found, inv_temp = [], 1.0
    for _ in range(attack.steps):
        leaves = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in u]
        channels = []
        for leaf, levels_of in zip(leaves, reached, strict=True):
            share = torch.zeros(levels, dtype=torch.float64)
            share = share.index_put((torch.tensor(list(levels_of)),), F.softmax(inv_temp * leaf, 0))
            if model.code == "thermometer":
                share = torch.stack([share[level:].sum() for level in range(levels)])
            channels.append(share)
        side = x.shape[-1]
        code = torch.stack(channels).view(x.shape[0], side * side, levels).transpose(1, 2).reshape(1, -1, side, side)
        loss = F.cross_entropy(model.classifier(code), torch.tensor([y]))
        gradients = torch.autograd.grad(loss, leaves)
        for values, gradient in zip(u, gradients, strict=True):
            for place, slope in enumerate(gradient.tolist()):
                rise = float(slope > 0) - float(slope < 0) if attack.sign else slope
                values[place] += attack.step_size * rise
        inv_temp *= attack.growth
        found.append(rendered(pixels, u, reached, levels).view_as(x))
    return found


def rendered(pixels: list[float], u: list[list[float]], reached: list[range], levels: int) -> Tensor:
    """The nearest point of each pixel's best level; edges are where 0.99999 x levels is whole."""
    image = []
    for value, values, levels_of in zip(pixels, u, reached, strict=True):
        own = math.floor(0.99999 * value * levels)
        best = levels_of[values.index(max(values))]
        if values[own - levels_of[0]] >= max(values) or best == own:
            image.append(value)
        else:
            image.append((best + (best < own)) / levels / 0.99999)
    return torch.tensor(image, dtype=torch.float64)


class Watching(LSPGA):
    """Keeps the image of every step."""

    def step(self, search: Search, state: Any) -> Any:
        state = super().step(search, state)
        if not hasattr(self, "found"):
            self.found: list[Tensor] = []
        self.found.append(state.x.clone())
        return state


@pytest.mark.parametrize("code", ["thermometer", "one_hot"])
@pytest.mark.parametrize(("sign", "step_size"), [(True, 1.0), (True, 0.3), (False, 5.0)])
def test_every_step_is_that_of_a_plain_loop(code: Any, sign: bool, step_size: float) -> None:
    model, x, y = problem(3, code=code)
    attack = Watching(ThreatModel("linf", 0.13), 5, step_size, sign, stop_at_hit=False)
    attack(model, x, y)
    for row in range(3):
        for ours, theirs in zip(attack.found, by_hand(model, x[row], int(y[row]), attack), strict=True):
            torch.testing.assert_close(ours[row], theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.03, 0.13, 0.3, 1.0])
def test_the_levels_reached_are_those_of_all_points_between(eps: float) -> None:
    model, x, y = problem(2)
    attack = LSPGA(ThreatModel("linf", eps))
    search = Search(attack, QueryOracle(model, 2), x, y, None, torch.arange(2))
    reached = attack.start(search, torch.arange(2)).reached
    between = torch.linspace(-1, 1, 10_001, dtype=torch.float64)
    expected = torch.zeros_like(reached)
    for row, c, i, j in ((r, c, i, j) for r in range(2) for c in range(3) for i in range(4) for j in range(4)):
        levels = torch.unique(bucket((x[row, c, i, j] + eps * between).clamp(0, 1), 16)).long()
        expected[row, c, levels, i, j] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("levels", [4, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", ["8/255", 0.3])
def test_images_of_levels_have_these_levels_and_stay_in_the_ball(levels: int, dtype: torch.dtype, eps: Any) -> None:
    """Every reachable level of pixels on, beside and between the edges."""
    threat = ThreatModel("linf", eps)
    grid = torch.arange(levels + 1, dtype=dtype) / levels
    x0 = torch.cat(
        [grid, torch.nextafter(grid, grid * 0), torch.nextafter(grid, grid + 2), torch.rand(500, dtype=dtype)]
    )
    x0 = x0.clamp(0, 1).view(-1, 1, 1, 1)
    model = Thermometer(nn.Identity(), levels, channels=1, num_classes=2)
    lowest, highest = model.index(threat.project(x0 - 2, x0)), model.index(threat.project(x0 + 2, x0))
    for level in range(levels):
        some = ((lowest <= level) & (highest >= level)).flatten()
        image = model.nearest(torch.full_like(x0[some], level, dtype=torch.int64), x0[some])
        assert torch.equal(model.index(image), torch.full_like(image, level))
        assert torch.equal(threat.project(image, x0[some]), image)
        own = model.index(x0[some]) == level
        assert torch.equal(image[own], x0[some][own])


def test_it_asks_twice_a_step_and_about_the_image_when_due() -> None:
    x = images(4, 7)
    base = Coded(Small()).eval()
    y = base(x).argmax(1)
    for every, asked in ((1, 5), (2, 3), (3, 2), (9, 1)):
        model = counting(base, x).eval()
        attack = LSPGA(ThreatModel("linf", 0.0), 5, check_every=every)
        with pytest.warns(UserWarning, match="gradient was exactly 0"):  # one level of each pixel is reached
            result = attack(QueryOracle(model, 4, known_right=True), x, y)
        assert not result.success.any()
        assert result.queries.tolist() == [5 + asked] * 4 == model.seen.tolist()
        assert result.checks.tolist() == [0] * 4


def test_only_images_are_candidates() -> None:
    """What is returned is the image of some step, never a mean code or what lies outside the ball."""
    model, x, y = problem(20)
    attack = LSPGA(ThreatModel("linf", 0.1), 7)
    result = attack(model, x, y)
    assert result.success.any()
    assert result.x_adv.shape == x.shape
    assert torch.equal(model(result.x_adv).argmax(1) != y, result.success)
    assert attack.threat.within(result.x_adv, x).all()


def test_random_starts_break_no_fewer_and_differ() -> None:
    model, x, y = problem(40)
    threat = ThreatModel("linf", 0.06)

    def run(**arguments: Any) -> AttackResult:
        return LSPGA(threat, 3, random_start=True, **arguments)(model, x, y)

    once, often = run(), run(restarts=4)
    assert (often.success | ~once.success).all()
    assert int(often.success.sum()) >= int(once.success.sum())
    first, second = (
        LSPGA(threat, 1, random_start=True, seed=seed).perturb(model, x, y, index=torch.arange(40)) for seed in (0, 1)
    )
    assert not torch.equal(first, second)


def test_perturb_gives_the_last_image() -> None:
    model, x, y = problem(3)
    attack = LSPGA(ThreatModel("linf", 0.13), 4)
    out = attack.perturb(model, x, y)
    for row in range(3):
        torch.testing.assert_close(out[row], by_hand(model, x[row], int(y[row]), attack)[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, torch.nan, 1e30])
def test_gradients_that_lead_nowhere_leave_finite_images(scale: float) -> None:
    model, x, _ = problem(2)
    y = torch.zeros(2, dtype=torch.int64)
    assert isinstance(model.classifier, Hidden)
    with torch.no_grad():
        model.classifier.second.mul_(scale)
    attack = LSPGA(ThreatModel("linf", 0.1), 2, sign=False)
    with torch.no_grad():
        out = attack.perturb(QueryOracle(model, 1), x[:1], y[:1])
    assert attack.threat.within(out, x[:1]).all()


def test_a_model_without_codes_is_refused() -> None:
    x = images(2)
    with pytest.raises(ValueError, match=r"got Small: attack it by lit_adv.attacks.PGD"):
        LSPGA()(Small().eval(), x, torch.zeros(2, dtype=torch.int64))
    model, x, y = problem(2)
    with pytest.raises(AccessDenied, match="GRADIENT"):
        LSPGA()(QueryOracle(model, 2, Access.LOGITS), x, y)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"threat": ThreatModel("l2", 1.0)}, "norm 'linf'"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"check_every": 1.5}, "check_every must be a whole number"),
        ({"growth": 0}, "growth > 0"),
        ({"step_size": -1}, "step_size must be >= 0"),
        ({"restarts": 2}, "restarts must be 1 without random_start"),
    ],
)
def test_arguments_out_of_their_range(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LSPGA(**arguments)


def test_its_state_keeps_one_entry_a_row() -> None:
    model, x, y = problem(4)
    attack = LSPGA()
    search = Search(attack, QueryOracle(model, 4), x, y, None, torch.arange(4))
    state = attack.start(search, torch.arange(4))
    assert isinstance(state, LSPGAState)
    assert len(state[torch.tensor([True, False, True, False])] + attack.start(search, torch.tensor([1]))) == 3
