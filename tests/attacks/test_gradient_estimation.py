"""Gradient estimation attacks through PGD: the paper's query counts, signs, clipping and what they reach."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from contracts.nets import Counting, Linear, Recording, Small, decided, images, safe
from jsonargparse import ArgumentParser
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lit_adv.attack import Attack, AttackResult, IterativeAttack
from lit_adv.attacks import PGD, RandomNoise
from lit_adv.draws import Draws
from lit_adv.estimators import Coordinates, FiniteDifference, PrincipalComponents, RandomGroups
from lit_adv.estimators.finite_difference import Basis
from lit_adv.losses import cross_entropy, margin, margin_to, probability, rival
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "attack"
MNIST = (1, 28, 28)
BALL = ThreatModel("linf", 0.1)
PIXELS = Coordinates()


def named(file: str) -> PGD:
    """The attack of a configuration."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--attack", type=Attack)
    config = yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())["init_args"]["attack"]
    attack = parser.instantiate(parser.parse_object({"attack": config})).attack
    assert isinstance(attack, PGD)
    return attack


def estimating(loss: Any = margin, basis: Basis = PIXELS, delta: float = 0.01, steps: int = 1, **settings: Any) -> PGD:
    """An attack of the paper: one step of the radius, or several that reach it."""
    arguments = {"step_size": 0.1 / steps, "random_start": False} | settings
    kappa = 0.0 if loss is margin else None
    options = {name: arguments.pop(name) for name in ("clip", "two_sided", "block") if name in arguments}
    estimator = FiniteDifference(basis, delta, **options)
    threat = arguments.pop("threat", BALL)
    return PGD(threat, steps, loss=loss, kappa=kappa, estimator=estimator, **arguments)


def run(attack: IterativeAttack, model: nn.Module, x: Tensor, y: Tensor, target: Tensor | None = None) -> AttackResult:
    return attack(QueryOracle(model, len(x), known_right=True), x, y, target)


# query counts


@pytest.mark.parametrize(
    ("file", "queries", "estimates"),
    [
        ("fd_xent_linf_mnist", 1568, 1),
        ("fd_logit_linf_mnist", 1568, 1),
        ("rand_fd_logit_linf_mnist", 1568, 1),
        ("ifd_logit_linf_mnist", 62720, 40),
        ("ge_rg8_logit_linf_mnist", 196, 1),
        ("ge_rg8_xent_linf_mnist", 196, 1),
        ("ige_rg8_logit_linf_mnist", 7840, 40),
        ("ige_rg8_xent_linf_mnist", 7840, 40),
        ("ge_pca100_logit_linf_mnist", 200, 1),
        ("ige_pca100_logit_linf_mnist", 8000, 40),
    ],
)
def test_queries_are_those_of_the_paper(file: str, queries: int, estimates: int) -> None:
    """And a base query for each estimate and one for the last look, which the paper does not count."""
    inner, x, y = safe(count=1, shape=MNIST)
    model = Counting(inner, x)
    attack = named(file)
    attack.stop_at_hit = False
    assert isinstance(attack.estimator, FiniteDifference)
    attack.estimator = replace(attack.estimator, block=400)  # fewer passes of the same probes
    if attack.needs_fit:
        attack.fit(images(150, 2, MNIST), torch.zeros(150, dtype=torch.int64))
    result = run(attack, model, x, y)
    assert (result.queries - result.checks).tolist() == [queries]
    assert result.checks.tolist() == [estimates + 1]
    assert result.queries.tolist() == model.seen.tolist()


@pytest.mark.parametrize(
    ("file", "queries"),
    [
        ("fd_logit_linf_cifar10", 6144),
        ("ifd_xent_linf_cifar10", 61440),
        ("ifd_logit_linf_cifar10", 61440),
        ("ige_rg8_logit_linf_cifar10", 7680),
        ("ge_pca400_logit_linf_cifar10", 800),
        ("ige_pca400_logit_linf_cifar10", 8000),
    ],
)
def test_queries_on_larger_images_are_those_of_the_paper(file: str, queries: int) -> None:
    attack, shape = named(file), torch.Size((3, 32, 32))
    assert isinstance(attack.estimator, FiniteDifference)
    if attack.estimator.needs_fit:
        assert isinstance(attack.estimator.basis, PrincipalComponents)
        assert 2 * attack.estimator.basis.components * attack.steps == queries
    else:
        assert attack.estimator.probes(shape) * attack.steps == queries


@pytest.mark.parametrize(("two_sided", "each"), [(True, 48), (False, 24)])
@pytest.mark.parametrize("block", [5, 64])
def test_one_side_costs_half(two_sided: bool, each: int, block: int) -> None:
    model, x, y = safe()
    attack = estimating(basis=RandomGroups(8), steps=3, two_sided=two_sided, stop_at_hit=False, block=block)
    result = run(attack, model, x, y)
    assert (result.queries - result.checks).tolist() == [3 * each] * 3
    assert result.checks.tolist() == [4] * 3


@pytest.mark.parametrize(("budget", "spent"), [(0, 0), (1, 0), (48, 0), (49, 49), (60, 50), (98, 98), (1000, 148)])
def test_a_budget_pays_whole_estimates(budget: int, spent: int) -> None:
    inner, x, y = safe()
    model = Counting(inner, x)
    attack = estimating(basis=RandomGroups(8), steps=3, block=10)
    result = attack(QueryOracle(model, 3, budget=budget, known_right=True), x, y)
    assert result.queries.tolist() == model.seen.tolist() == [spent] * 3


# signs


@pytest.mark.parametrize("two_sided", [True, False])
def test_a_step_on_a_linear_model_changes_the_margin_by_eps_times_the_dual_norm(two_sided: bool) -> None:
    model, x = Linear(4), 0.4 + 0.2 * images(6)
    with torch.no_grad():
        model.weight.mul_(1e-3)
    y = decided(model, x)
    for target in (None, (y + 1) % 4):
        attack = estimating(clip="none", two_sided=two_sided, stop_at_hit=False)
        x_adv = attack.perturb(model, x, y) if target is None else _perturbed(attack, model, x, y, target)
        with torch.no_grad():
            other = rival(model(x), y, target)
            gain = margin_to(other, model(x_adv), y, target) - margin_to(other, model(x), y, target)
            own = y if target is None else other
            towards = other if target is None else target
            weight = model.weight[towards] - model.weight[own]
        torch.testing.assert_close(gain, 0.1 * weight.abs().sum(1))


def _perturbed(attack: PGD, model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return attack.perturb(QueryOracle(model, len(x)), x, y, target)


def test_both_losses_agree_in_sign_on_two_classes() -> None:
    model, x = Linear(2), 0.4 + 0.2 * images(6)
    with torch.no_grad():
        model.weight.mul_(0.01)
    y = decided(model, x)
    first, second = (estimating(loss, clip="none").perturb(model, x, y) for loss in (margin, probability))
    torch.testing.assert_close(first, second)
    assert (first != x).all()


@pytest.mark.parametrize("loss", [margin, probability])
def test_exact_differences_give_the_white_box_step(loss: Any) -> None:
    model, x = Small(), 0.2 + 0.6 * images(8)
    y = decided(model, x)
    ours = estimating(loss, delta=1e-5, clip="none").perturb(model, x, y)
    theirs = PGD(BALL, 1, 0.1, False, loss=loss, kappa=0.0 if loss is margin else None).perturb(model, x, y)
    torch.testing.assert_close(ours, theirs)


def test_log_probabilities_serve_as_well_as_logits() -> None:
    class LogProbabilities(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x).log_softmax(1)

    model, x = Small(), images(6)
    y = decided(model, x)
    attack = estimating(basis=RandomGroups(4), steps=3, stop_at_hit=False)
    first = run(attack, model, x, y)
    second = attack(QueryOracle(LogProbabilities(), 6, known_right=True, output="log_probs"), x, y)
    torch.testing.assert_close(first.x_adv, second.x_adv)
    assert torch.equal(first.success, second.success)


# where images may go, and when they stay


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"noise": 0.03, "step_size": 0.07}, {"steps": 4, "step_size": 0.05}])
def test_every_image_stays_in_ball_and_box(settings: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = Small().to(dtype), images(10, dtype=dtype)
    x[0], x[1], x[2] = 0, 1, images(1, 5, dtype=dtype)[0].round()
    y = decided(model, x)
    for basis in (Coordinates(), RandomGroups(8)):
        result = run(estimating(basis=basis, stop_at_hit=False, **settings), model, x, y)
        assert (result.x_adv - x).abs().max() <= 0.1 + 1e-6
        assert result.x_adv.min() >= 0
        assert result.x_adv.max() <= 1


def test_the_estimate_after_noise_is_taken_where_the_noise_led() -> None:
    model, x = safe()[0], 0.3 + 0.4 * images(1)
    recording = Recording(model)
    attack = estimating(noise=0.03, step_size=0.07, stop_at_hit=False)
    run(attack, recording, x, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close((recording.given[0][:1] - x).abs(), torch.full_like(x, 0.03))


def test_an_image_that_is_wrong_moves_no_more_with_kappa_0() -> None:
    model, x = Small(), images(6)
    wrong = (decided(model, x) + 1) % 4
    stays = run(estimating(steps=3, stop_at_hit=False), model, x, wrong)
    assert torch.equal(stays.x_adv, x)
    goes_on = run(estimating(probability, delta=1.0, steps=3, stop_at_hit=False), model, x, wrong)
    assert (goes_on.x_adv != x).flatten(1).any(1).all()


def test_stopping_at_a_hit_finds_all_that_running_on_finds() -> None:
    model, x, y = few(12)
    settings = {"threat": ThreatModel("linf", 0.2), "step_size": 0.02, "steps": 10}
    stopped = run(estimating(**settings), model, x, y)  # type: ignore[arg-type]
    running = run(estimating(stop_at_hit=False, **settings), model, x, y)  # type: ignore[arg-type]
    assert torch.equal(stopped.success, running.success)
    assert torch.equal(stopped.first_hit, running.first_hit)
    assert stopped.queries.sum() < 0.7 * running.queries.sum()


def test_saturated_probabilities_leave_images_where_they_are_and_are_reported() -> None:
    model, x = Linear(3).float(), images(4, dtype=torch.float32)
    with torch.no_grad():
        model.bias[0] = 1e3
    y = torch.zeros(4, dtype=torch.int64)
    result = run(estimating(probability, delta=1.0, steps=2, stop_at_hit=False), model, x, y)
    assert torch.equal(result.x_adv, x)
    assert result.counts["gradient estimates were exactly 0"] == (8, 8)
    awake = run(estimating(cross_entropy, delta=1.0, steps=2, stop_at_hit=False), Linear(3).float(), x, y)
    assert awake.counts["gradient estimates were exactly 0"][0] < 8


def test_an_answer_that_is_no_number_does_no_harm() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = inner(x)
            return torch.where((x[:, :1, 0, 0] > x0[0, 0, 0, 0] + 0.005).to(x.dtype).bool(), torch.nan, scores)

    inner, x0 = Small(), 0.3 + 0.4 * images(1)
    y = decided(inner, x0)
    ours = estimating(clip="none", stop_at_hit=False).perturb(Broken(), x0, y)
    plain = estimating(clip="none", stop_at_hit=False).perturb(inner, x0, y)
    assert ours[0, 0, 0, 0] == x0[0, 0, 0, 0]
    torch.testing.assert_close(ours.flatten()[1:], plain.flatten()[1:])


# what it reaches, on the 8x8 digits

EPS = ThreatModel("linf", 0.25)


@cache
def digits() -> tuple[Tensor, Tensor]:
    loaded = load_digits()
    x = torch.from_numpy(loaded.images).float().div(16).unsqueeze(1)
    return x, torch.from_numpy(loaded.target).long()


def trained(adversarial: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, and 30 test images that it gets right."""
    torch.manual_seed(0)
    x, y = digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 6e-3)
    for _ in range(120):
        batch = x[:1400]
        if adversarial:
            leaf = batch.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), y[:1400]), leaf)
            batch = torch.cat([batch, (batch + 0.25 * gradient.sign()).clamp(0, 1)])
        optimizer.zero_grad()
        F.cross_entropy(net(batch), y[:1400].repeat(len(batch) // 1400)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    net.eval()
    right = (decided(net, x[1400:]) == y[1400:]).nonzero().squeeze(1)[:30]
    return net, x[1400:][right], y[1400:][right]


@cache
def digits_net() -> tuple[nn.Module, Tensor, Tensor]:
    return trained(False)


def few(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network and the first of its images."""
    model, x, y = digits_net()
    return model, x[:count], y[:count]


def on_digits(basis: Basis = PIXELS, steps: int = 1, step_size: float = 0.25) -> PGD:
    return estimating(basis=basis, steps=steps, step_size=step_size, threat=EPS, stop_at_hit=False)


def true_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(margin(model(leaf), y).sum(), leaf)
    return gradient


def estimated(basis: Basis, model: nn.Module, x: Tensor, y: Tensor, clip: str = "box") -> Tensor:
    with torch.no_grad():
        other = rival(model(x), y)

        def f(probes: Tensor) -> Tensor:
            scores = model(probes.flatten(0, -4)).view(*probes.shape[:-3], -1)
            return margin_to(other, scores, y)

        estimator = FiniteDifference(basis, clip=clip)  # type: ignore[arg-type]
        drawn = Draws(0, torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64))
        return estimator(f, x, estimator.init(x), drawn, (0.0, 1.0))[1]


def cosine(first: Tensor, second: Tensor) -> float:
    return float(F.cosine_similarity(first.flatten(1), second.flatten(1)).mean())


def share(result: AttackResult) -> float:
    return float(result.success.float().mean())


def test_signs_agree_with_autograd_in_float32() -> None:
    model, x, y = digits_net()
    true, ours = true_gradient(model, x, y), estimated(Coordinates(), model, x, y)
    large = true.abs() > 0.05 * true.abs().amax((1, 2, 3), keepdim=True)
    agree = ours.sign() == true.sign()
    assert agree.float().mean() > 0.97
    assert agree[large].float().mean() > 0.99


def test_differences_reach_what_the_white_box_reaches() -> None:
    model, x, y = digits_net()
    white = PGD(EPS, 1, 0.25, False, loss=margin, kappa=0.0, stop_at_hit=False)
    assert abs(share(run(on_digits(), model, x, y)) - share(run(white, model, x, y))) <= 0.03


def test_cosine_with_the_gradient_falls_with_the_size_of_groups_and_grows_with_the_components() -> None:
    model, x, y = digits_net()
    true = true_gradient(model, x, y)
    groups = [cosine(estimated(RandomGroups(size), model, x, y), true) for size in (1, 8, 64)]
    assert groups[0] > groups[1] > groups[2]
    found = []
    for count in (3, 10, 40):
        basis = PrincipalComponents(count)
        basis.fit(digits()[0][:1400])
        found.append(cosine(estimated(basis, model, x, y), true))
    assert found[0] < found[1] < found[2]


def test_steps_beat_one_step_and_move_less_far() -> None:
    model, x, y = few(15)
    basis = PrincipalComponents(30)
    basis.fit(digits()[0][:1400])
    bases: list[Basis] = [Coordinates(), RandomGroups(2), basis]
    noise = run(RandomNoise(EPS, stop_at_hit=False), model, x, y)
    for basis_ in bases:
        one, many = run(on_digits(basis_), model, x, y), run(on_digits(basis_, 25, 0.01), model, x, y)
        assert share(many) >= share(one)
        assert share(many) > 0.9
        assert share(one) > share(noise)
        assert _length(many, x) < 0.8 * _length(one, x)
        assert _length(many, x) < _length(noise, x)


def _length(result: AttackResult, x: Tensor) -> float:
    return float((result.x_adv - x).flatten(1).norm(dim=1).mean())


def test_adversarial_training_costs_the_single_step_more_than_the_steps() -> None:
    plain, trained_ = digits_net(), trained(True)
    one = [share(run(on_digits(), *net)) for net in (plain, trained_)]
    many = share(run(on_digits(steps=25, step_size=0.01), *trained_))
    assert one[1] < one[0]
    assert many >= one[1] - 0.02
