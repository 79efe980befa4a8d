"""NAttack against the paper's arithmetic, computed by brute force in numpy from the keyed draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contracts.nets import Counting, Linear, Small, decided, images, near_boundary
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_adv.attacks import NAttack
from lit_adv.draws import Draws
from lit_adv.losses import Loss, cross_entropy, hinge, margin
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
Array = NDArray[np.float64]


def safe(scale: float = 0.2, count: int = 3, shape: tuple[int, ...] = (3, 8, 8)) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier that no small change can fool, images and labels."""
    model = Linear(3, shape)
    x = 0.1 + 0.8 * images(count, 4, shape)
    with torch.no_grad():
        model.weight *= scale
        model.bias[0] = 1e3
    return model, x, torch.zeros(count, dtype=torch.int64)


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
    else:
        length = np.sqrt((delta**2).sum((-3, -2, -1), keepdims=True))
        delta = delta * np.minimum(1, attack.threat.radius / np.maximum(length, 1e-300))
    return np.clip(x + delta, 0, 1)


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
                rewards = attack.loss(model(batch)[None], y[i : i + 1], None, None)[0].numpy()
            known = np.isfinite(rewards)
            centred = np.where(known, rewards, 0)
            if attack.zscore:
                mean, spread = rewards[known].mean(), rewards[known].std()
                centred = np.where(known, (rewards - mean) / (spread + 1e-7), 0)
            direction = (centred[:, None, None, None] * noise[step][i]).sum(0)
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
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 3])
def test_update_is_the_papers_formula(name: str, steps: int) -> None:
    settings = {"threat": ThreatModel("linf", 0.05), "step_size": 0.05, "loss": margin, **CASES[name]}
    attack = NAttack(steps=steps, stop_at_hit=False, seed=3, **settings)  # type: ignore[arg-type]
    model, x, y = safe()
    if name == "cross-entropy":
        model.bias.data[0] = 20.0  # type: ignore[union-attr, operator]
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
    found = [
        NAttack(ThreatModel("linf", 0.1), 4, 10, 0.05, loss=loss, block=3)(model, x, y).x_adv for loss in losses
    ]
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


# what is asked


class Recording(nn.Module):
    """Keeps every image it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert len(x)
        self.given.append(x.clone())
        return self.inner(x)


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.031), ThreatModel("l2", 0.4)], ids=["linf", "l2"])
@pytest.mark.parametrize("space", ["tanh", "pixel"])
def test_every_query_lies_in_ball_and_box(threat: ThreatModel, space: str) -> None:
    x = images(1)
    x[0, 0, 0] = 0
    x[0, 1, 0] = 1
    model = Recording(safe()[0])
    NAttack(threat, 3, 20, 0.1, 0.3, space=space)(model, x, torch.zeros(1, dtype=torch.int64))  # type: ignore[arg-type]
    given = torch.cat(model.given)
    assert len(given) == 61
    assert given.min() >= 0
    assert given.max() <= 1
    assert (threat.distance(given, x) <= threat.radius * (1 + 1e-9)).all()
    assert (threat.distance(given, x) >= 0.9 * threat.radius).double().mean() > 0.5


@pytest.mark.parametrize("shrink", [1e-6, 0.01, 0.1])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-1.0, 1.0)])
def test_the_start_moves_by_half_the_shrink_at_most(shrink: float, box: tuple[float, float]) -> None:
    width = box[1] - box[0]
    x = box[0] + width * images(1)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = box
    model = Recording(safe()[0])
    attack = NAttack(ThreatModel("linf", 0.5, box), 1, 4, init_std=0.0, shrink=shrink, schedule="mean")
    attack(model, x, torch.zeros(1, dtype=torch.int64))
    moved = (model.given[0] - x).abs().amax()
    assert moved <= width * shrink / 2 + 1e-12
    assert moved >= 0.99 * width * shrink / 2


@pytest.mark.parametrize("schedule", ["samples", "mean"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_radius_no_change(schedule: str, norm: str) -> None:
    x = images(3)
    model = Recording(Small())
    attack = NAttack(ThreatModel(norm, 0), 2, 6, schedule=schedule)  # type: ignore[arg-type]
    result = attack(model, x, decided(Small(), x))
    assert not result.success.any()
    assert torch.equal(result.x_adv, x)
    assert all(torch.equal(image, x[(x == image).flatten(1).all(1)][0]) for image in torch.cat(model.given))


def test_black_and_white_pixels_are_finite_and_frozen_or_not() -> None:
    model, x, y = safe()
    x[0], x[1] = 0, 1
    for shrink, least, most in ((1e-6, 0, 1e-4), (0.1, 0.05, 0.3)):
        result = NAttack(ThreatModel("linf", 0.3), 20, 20, 0.008, shrink=shrink, loss=margin)(model, x, y)
        moved = (result.x_adv - x).flatten(1).abs().amax(1)
        assert result.x_adv.isfinite().all()
        assert (moved[:2] <= most).all()
        assert (moved[:2] >= least).all()


@pytest.mark.parametrize(
    ("steps", "samples", "block", "every", "tests"),
    [(1, 5, 2, 10, 1), (7, 4, 4, 3, 3), (20, 3, 32, 10, 2), (21, 3, 2, 10, 3), (4, 6, 5, 1, 4)],
)
def test_released_schedule_costs_exactly_its_arithmetic(
    steps: int, samples: int, block: int, every: int, tests: int
) -> None:
    inner, x, y = safe()
    model = Counting(inner, x)
    attack = NAttack(
        ThreatModel("linf", 0.01), steps, samples, schedule="mean", check_every=every, block=block, stop_at_hit=False
    )
    result = attack(QueryOracle(model, 3, chunk=6), x, y)
    assert torch.equal(result.queries, model.seen)
    assert (result.queries - result.checks).tolist() == [samples * steps] * 3
    assert result.checks.tolist() == [tests + 1] * 3  # and the mean after the last update
    assert result.iterations.tolist() == [steps] * 3


def test_released_schedule_looks_at_the_mean_only() -> None:
    """Samples far out are adversarial from the start; the mean is not."""
    model, x, y, distance = near_boundary(4, "linf")
    threat = ThreatModel("linf", 12 * distance)
    settings = {"steps": 1, "samples": 50, "sigma": 3.0, "step_size": 1e-9}
    assert NAttack(threat, **settings)(model, x, y).success.all()  # type: ignore[arg-type]
    assert not NAttack(threat, schedule="mean", **settings)(model, x, y).success.any()  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [5, 20])
def test_a_mean_that_wins_is_the_last_query(block: int) -> None:
    model, x, y, distance = near_boundary(6, "linf")
    counter = Counting(model, x)
    attack = NAttack(
        ThreatModel("linf", 3 * distance), 40, 20, 0.02, schedule="mean", check_every=2, block=block, loss=margin
    )
    result = attack(QueryOracle(counter, 6), x, y)
    assert result.success.all()
    assert torch.equal(result.queries, result.first_hit)
    assert torch.equal(result.queries, counter.seen)
    steps = result.iterations
    assert (steps > 0).all()
    assert torch.equal(result.queries, 20 * steps + result.checks)
    assert torch.equal(result.checks, steps // 2 + 1)


def test_a_hit_stays_where_it_is_with_more_steps() -> None:
    x = images(8)
    y = decided(Small(), x)
    short, long = (NAttack(ThreatModel("linf", 0.2), steps, 20, 0.05)(Small(), x, y) for steps in (6, 20))
    sampled = short.success & (short.checks == 0)  # not by the check of the mean at the end
    assert sampled.any()
    assert torch.equal(long.first_hit[sampled], short.first_hit[sampled])
    assert torch.equal(long.x_adv[sampled], short.x_adv[sampled])
    assert long.success[short.success & sampled].all()
    assert long.success.sum() > sampled.sum()


def test_a_sample_that_wins_ends_the_row_in_its_block() -> None:
    x = images(8)
    y = decided(Small(), x)
    result = NAttack(ThreatModel("linf", 0.2), 20, 20, 0.05, block=4)(Small(), x, y)
    won = result.success & (result.checks == 0)
    assert won.any()
    assert (result.queries[won] % 4 == 0).all()
    assert ((result.queries - result.first_hit)[won] < 4).all()
    assert torch.equal((result.first_hit - 1)[won] // 20, result.iterations[won])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_yardstick(norm: str) -> None:
    model, x, y, distance = near_boundary(4, norm)
    for factor, wins in ((1.25, True), (0.95, False)):
        threat = ThreatModel(norm, factor * distance)  # type: ignore[arg-type]
        attack = NAttack(threat, 60, 60, 0.2, 0.1, block=60)
        result = attack(model, x, y)
        assert result.success.tolist() == [wins] * 4
        if wins:
            assert (decided(model, result.x_adv) != y).all()
            assert (result.distance >= 0.999 * distance).all()


def test_targeted_attacks_reach_their_target() -> None:
    x, model = images(6), Small()
    y = decided(model, x)
    target = (y + 1) % 4
    result = NAttack(ThreatModel("linf", 0.5), 40, 30, 0.1, shrink=0.1)(model, x, y, target)
    assert result.success.double().mean() > 0.4
    assert torch.equal(decided(model, result.x_adv)[result.success], target[result.success])


def test_scores_of_any_kind_give_one_result() -> None:
    """The margin of logits is that of log-probabilities."""
    x = images(4)
    y = decided(Small(), x)
    attack = NAttack(ThreatModel("linf", 0.1), 5, 20, 0.05, loss=hinge)
    logits = attack(QueryOracle(Small(), 4, Access.LOGITS), x, y)
    probs = attack(QueryOracle(Small(), 4, Access.PROBS), x, y)
    torch.testing.assert_close(logits.x_adv, probs.x_adv, rtol=0, atol=1e-8)
    assert torch.equal(logits.queries, probs.queries)


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
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NAttack(**arguments)  # type: ignore[arg-type]
