"""NAttack against the paper's arithmetic, computed by brute force in numpy from the keyed draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contracts.nets import Linear, images, safe
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_adv.attacks import NAttack
from lit_adv.draws import Draws
from lit_adv.losses import Loss, cross_entropy, margin
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
Array = NDArray[np.float64]


def population(attack: NAttack, rows: Tensor, step: int, shape: tuple[int, ...]) -> Array:
    """The noise of one step, all samples at once; pairs stand together if antithetic."""
    draws = Draws(attack.seed, rows, torch.full_like(rows, step))
    first = torch.zeros_like(rows)
    if not attack.antithetic:
        return draws.normal(attack.samples, *shape, first=first).double().numpy()
    half = draws.normal(attack.samples // 2, *shape, first=first).double().numpy()
    return np.concatenate([half, -half], 1)


def resized(phi: Array, height: int, width: int) -> Array:
    """Bilinear with half-pixel centres, one axis after the other."""
    for axis, out in ((-2, height), (-1, width)):
        size = phi.shape[axis]
        place = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
        low = np.floor(place).astype(int)
        high, share = np.minimum(low + 1, size - 1), place - low
        share = share[:, None] if axis == -2 else share
        phi = np.take(phi, low, axis) * (1 - share) + np.take(phi, high, axis) * share
    return phi


def rendered(attack: NAttack, phi: Array, x: Array) -> Array:
    """The image of a latent, for x (C, H, W) and phi (..., C, h, w)."""
    grown = resized(phi, *x.shape[-2:]) if phi.shape[-2:] != x.shape[-2:] else phi
    if attack.space == "tanh":
        image = 0.5 * (np.tanh(np.arctanh((1 - attack.shrink) * (2 * x - 1)) + grown) + 1)
    else:
        image = x + grown
    delta = image - x
    if attack.threat.norm == "linf":
        delta = np.clip(delta, -attack.threat.radius, attack.threat.radius)
    elif attack.threat.radius < math.inf:
        length = np.sqrt((delta**2).sum((-3, -2, -1), keepdims=True))
        delta = delta * np.minimum(1, attack.threat.radius / np.maximum(length, 1e-300))
    return np.clip(x + delta, 0, 1)


def rewarded(attack: NAttack, scores: Tensor, y: Tensor) -> Array:
    """Rewards of one image's population, scores (N, K)."""
    if callable(attack.loss):
        return attack.loss(scores[None], y, None, None)[0].numpy()
    logs = scores.log_softmax(-1).numpy()
    runner_up = np.delete(logs[0], int(y)).max()  # one number, of the first sample, for all
    return -np.maximum(0, logs[:, int(y)] - runner_up)


def brute_force(attack: NAttack, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """The image of the mean after all steps, by equations (4) and (5) of the paper."""
    side = min(attack.latent, x.shape[-2]), min(attack.latent, x.shape[-1])
    latent = (x.shape[1], *side)
    start = Draws(attack.seed, index, torch.full_like(index, -1)).normal(*latent).double().numpy()
    noise = [population(attack, index, step, latent) for step in range(attack.steps)]
    out = []
    for i, clean in enumerate(x.numpy()):
        phi = attack.init_std * start[i]
        for step in range(attack.steps):
            batch = torch.tensor(rendered(attack, phi + attack.sigma * noise[step][i], clean))
            with torch.no_grad():
                rewards = rewarded(attack, model(batch), y[i : i + 1])
            if attack.objective == "distortion":
                lengths = np.sqrt(((batch.numpy() - clean) ** 2).sum((1, 2, 3)))
                rewards = attack.constant * rewards - lengths
            known = np.isfinite(rewards)
            centred = np.where(known, rewards, 0)
            if attack.zscore:
                mean, spread = rewards[known].mean(), rewards[known].std()
                centred = np.where(known, (rewards - mean) / (spread + 1e-7), 0)
            direction = (centred[:, None, None, None] * noise[step][i]).sum(0)
            if attack.sign_step:
                phi = phi + attack.step_size * np.sign(direction)
            else:
                phi = phi + attack.step_size / (attack.samples * attack.sigma) * direction
        out.append(torch.tensor(rendered(attack, phi, clean)))
    return torch.stack(out)


CASES: dict[str, dict[str, object]] = {
    "one block": {"samples": 12},
    "blocks": {"samples": 12, "block": 4},
    "uneven blocks": {"samples": 11, "block": 4},
    "last block of one": {"samples": 5, "block": 3},
    "blocks of one": {"samples": 5, "block": 1},
    "l2": {"samples": 10, "threat": ThreatModel("l2", 0.3)},
    "pixel": {"samples": 10, "space": "pixel"},
    "small latent": {"samples": 10, "latent": 4},
    "uneven latent": {"samples": 7, "latent": 3, "block": 2},
    "no zscore": {"samples": 10, "zscore": False, "step_size": 1e-3},
    "antithetic": {"samples": 12, "antithetic": True},
    "antithetic blocks": {"samples": 12, "antithetic": True, "block": 4},
    "antithetic odd blocks": {"samples": 10, "antithetic": True, "block": 3},
    "antithetic uneven blocks": {"samples": 6, "antithetic": True, "block": 4},
    "wide start": {"samples": 10, "init_std": 0.5, "shrink": 0.1},
    "mean": {"samples": 10, "block": 3, "schedule": "mean", "check_every": 2},
    "cross-entropy": {"samples": 10, "loss": cross_entropy},
    "released loss": {"samples": 11, "loss": "released", "block": 4},
    "signs of the estimate": {"samples": 10, "sign_step": True, "zscore": False, "antithetic": True, "step_size": 0.01},
    "distortion": {"samples": 11, "objective": "distortion", "constant": 0.3, "threat": ThreatModel("l2", "inf")},
    "distortion in the ball": {"samples": 8, "objective": "distortion", "threat": ThreatModel("l2", 0.4), "block": 3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 3])
def test_update_is_the_papers_formula(name: str, steps: int) -> None:
    settings = {"threat": ThreatModel("linf", 0.05), "step_size": 0.05, "loss": margin, **CASES[name]}
    attack = NAttack(steps=steps, stop_at_hit=False, seed=3, **settings)  # type: ignore[arg-type]
    model, x, y = safe()
    if "loss" in CASES[name]:  # of the usual size, since these saturate
        model.bias.data[0] = 12.0  # type: ignore[operator]
    index = torch.tensor([17, 4, 1000])
    result = attack(QueryOracle(model, 3, chunk=7), x, y, index=index)
    assert not result.success.any()
    torch.testing.assert_close(result.x_adv, brute_force(attack, model, x, y, index), rtol=0, atol=1e-9)
    torch.testing.assert_close(attack.perturb(model, x, y, index=index), result.x_adv, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 5, 9), (3, 40, 33), (1, 1, 1)])
def test_images_of_any_shape(shape: tuple[int, ...]) -> None:
    model, x, y = safe(shape=shape, count=2)
    attack = NAttack(ThreatModel("linf", 0.05), steps=1, samples=6, step_size=0.05, loss=margin)
    index = torch.arange(2)
    result = attack(QueryOracle(model, 2), x, y)
    torch.testing.assert_close(result.x_adv, brute_force(attack, model, x, y, index), rtol=0, atol=1e-9)


def test_rewards_matter_only_up_to_scale_and_shift() -> None:
    def changed(scores: Tensor, y: Tensor, target: Tensor | None, reject: int | None) -> Tensor:
        return 7 * margin(scores, y, target, reject) + 123

    model, x, y = safe()
    losses: list[Loss] = [margin, changed]
    found = [NAttack(ThreatModel("linf", 0.1), 4, 10, 0.05, loss=loss, block=3)(model, x, y).x_adv for loss in losses]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)  # the 1e-7 beside the spread
    assert (found[0] - x).abs().max() > 0.01


@pytest.mark.parametrize("value", [0.0, 0.3, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_move_nothing(value: float, dtype: torch.dtype) -> None:
    def constant(scores: Tensor, *_: object) -> Tensor:
        return scores[..., 0] * 0 + value

    model, x, y = safe()
    model, x = model.to(dtype), x.to(dtype)
    attacks = [NAttack(steps=steps, samples=30, step_size=1.0, loss=constant, block=7) for steps in (1, 5)]
    first, last = (attack(model, x, y).x_adv for attack in attacks)
    assert torch.equal(first, last)
    assert (first - x).abs().max() < 0.01


def test_samples_that_answer_nan_weigh_nothing() -> None:
    class Sick(nn.Module):
        def __init__(self, inner: nn.Module, lost: float) -> None:
            super().__init__()
            self.inner, self.lost, self.sick = inner, lost, False

        def forward(self, x: Tensor) -> Tensor:
            answer = self.inner(x)
            code = (x.flatten(1).sum(1) * 1e4) % 1  # a share of all images, chosen by themselves
            return torch.where((code < self.lost)[:, None] & self.sick, math.nan, answer)

    inner, x, y = safe()
    attack = NAttack(ThreatModel("linf", 0.05), 3, 40, 0.05, loss=margin, block=9, init_std=0.0)
    model = Sick(inner, 0.2)
    oracle = QueryOracle(model, 3)
    oracle.label(x, torch.arange(3))  # the first answer is sound
    model.sick = True
    result = attack(oracle, x, y)
    assert result.nonfinite > 0
    torch.testing.assert_close(result.x_adv, brute_force(attack, model, x, y, torch.arange(3)), rtol=0, atol=1e-9)
    hopeless = Sick(inner, 0.8)
    oracle = QueryOracle(hopeless, 3)
    oracle.label(x, torch.arange(3))
    hopeless.sick = True
    ended = attack(oracle, x, y)
    assert ended.iterations.tolist() == [1, 1, 1]
    assert not ended.success.any()
    assert ended.x_adv.isfinite().all()


@pytest.mark.parametrize("zscore", [True, False])
@pytest.mark.parametrize("antithetic", [True, False])
def test_the_estimate_points_along_the_gradient_of_a_linear_loss(zscore: bool, antithetic: bool) -> None:
    model = Linear(2, (1, 2, 5))
    x, y = torch.full((2, 1, 2, 5), 0.5, dtype=torch.float64), torch.tensor([0, 1])
    with torch.no_grad():
        model.bias[:] = -model(x)[0]  # the loss is zero at x: without z-scores a constant would be noise
    attack = NAttack(
        ThreatModel("linf", "inf"),
        steps=1,
        samples=20000,
        step_size=0.001,
        sigma=0.01,
        init_std=0.0,
        space="pixel",
        zscore=zscore,
        antithetic=antithetic,
        block=5000,
        loss=margin,
    )
    moved = attack.perturb(model, x, y) - x
    w = (model.weight[1] - model.weight[0]).detach()
    gradient = torch.stack([w, -w])
    cosine = nn.functional.cosine_similarity(moved.flatten(1), gradient)
    assert (cosine > 0.99).all()
    if not zscore:  # unbiased: the smoothed gradient itself
        torch.testing.assert_close(moved.flatten(1), 0.001 * gradient, rtol=0.05, atol=3e-4)


@pytest.mark.parametrize(("samples", "block"), [(12, 12), (12, 4), (10, 3), (6, 4), (2, 1), (14, 5)])
def test_antithetic_pairs_cancel_on_an_even_function(samples: int, block: int) -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            size = ((x - 0.5) ** 2).flatten(1).sum(1)
            return torch.stack([5 + size, size * 0], 1)

    x, y = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    attack = NAttack(
        ThreatModel("linf", 0.4), 1, samples, 1.0, 0.05, 0.0, space="pixel", zscore=False, antithetic=True, block=block
    )
    assert (attack.perturb(Even(), x, y) - x).abs().max() < 1e-10
    plain = NAttack(ThreatModel("linf", 0.4), 1, samples, 1.0, 0.05, 0.0, space="pixel", zscore=False, block=block)
    assert (plain.perturb(Even(), x, y) - x).abs().max() > 1e-6


def test_autocast_does_not_touch_the_update() -> None:
    class Elementwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 192, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, None] * self.weight).sum(-1) + torch.tensor([1e3, 0.0, 0.0])

    x, y = images(3, dtype=torch.float32), torch.zeros(3, dtype=torch.int64)
    attack = NAttack(ThreatModel("linf", 0.3), 3, 20, 0.05, loss=margin)
    plain = attack(Elementwise(), x, y).x_adv
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attack(Elementwise(), x, y).x_adv
    torch.testing.assert_close(cast, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"threat": ThreatModel("l1", 1)}, "l1"),
        ({"steps": 0}, "steps"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"samples": 5, "antithetic": True}, "samples must be even"),
        ({"sigma": 0.0}, "sigma"),
        ({"shrink": 0.0}, "shrink"),
        ({"shrink": 1.0}, "shrink"),
        ({"block": 0}, "block"),
        ({"check_every": 0}, "check_every"),
        ({"latent": 0}, "latent"),
        ({"space": "fourier"}, "space"),
        ({"schedule": "never"}, "schedule"),
        ({"init_std": -1.0}, "init_std"),
        ({"loss": "paper"}, "loss must be a function or 'released', got 'paper'"),
        ({"objective": "both"}, "objective must be adversarial or distortion"),
        ({"constant": 0.0}, "constant must be > 0"),
        ({"search_steps": 0}, "search_steps must be at least 1"),
        ({"search_steps": 3}, "search_steps > 1 needs objective: distortion"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NAttack(**arguments)  # type: ignore[arg-type]
