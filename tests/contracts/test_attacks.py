"""What every attack owes its caller; each file of ``configs/attack/`` is enrolled by itself."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from contracts.nets import Noisy, Small, behind, counting, decided, images
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lit_adv.attack import Attack, AttackResult, IterativeAttack
from lit_adv.attacks import PGD, Cascade, NAttack
from lit_adv.estimators import NES, Autograd
from lit_adv.losses import dlr, margin
from lit_adv.oracle import Access, AccessDenied, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was in training mode"),
    pytest.mark.filterwarnings("ignore:.*the gradient was exactly 0 or not finite"),
]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "attack"
MODEST = {
    "steps": 3, "samples": 12, "restarts": 2, "population": 6, "particles": 6, "coordinates": 8, "search_steps": 2,
    "init_tries": 5, "components": 6, "iterations": 4, "final_steps": 2, "targets": 2, "eot": 2,
}  # enough for a tiny net  # fmt: skip
RECORDS = ("success", "queries", "checks", "first_hit", "iterations")
FIVE = ThreatModel("linf", 0.05)


def shrunk(tree: Any) -> Any:
    """A configuration whose sizes are cut down for the test, and whose local models are tiny."""
    if isinstance(tree, dict):
        if tree.get("class_path") in ("lit_adv.tasks.Checkpoint", "lit_adv.models.Composed"):
            seed = sum(map(ord, str(tree["init_args"])))
            return {"class_path": "contracts.nets.Small", "init_args": {"seed": seed}}
        first = tree.get("initial")
        if isinstance(first, dict) and first.get("class_path") == "lit_adv.tasks.Checkpoint":  # answers means
            tree = {**tree, "initial": {"class_path": "contracts.nets.Means"}}
        if "models" in tree:  # the tiny ones have no backward passes with names
            tree = {key: value for key, value in tree.items() if key != "surrogate"}
        return {key: min(value, MODEST[key]) if key in MODEST else shrunk(value) for key, value in tree.items()}
    return [shrunk(value) for value in tree] if isinstance(tree, list) else tree


def configured(path: Path) -> Attack:
    """The attack of an evaluation's configuration."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--attack", type=Attack)
    config = yaml.safe_load(path.read_text())["init_args"]["attack"]
    attack: Attack = parser.instantiate(parser.parse_object({"attack": shrunk(config)})).attack
    if attack.needs_fit:
        attack.fit(images(40, 3), torch.arange(40) % 4)
    return attack


MADE: dict[str, Callable[[], Attack]] = {
    "fgsm": lambda: PGD(FIVE, 1, 0.05, False),
    "pgd": lambda: PGD(FIVE, 5),
    "pgd_all_steps": lambda: PGD(FIVE, 5, stop_at_hit=False),
    "pgd_l2_restarts": lambda: PGD(ThreatModel("l2", 0.4), 4, restarts=3, loss=margin),
    "pgd_l1": lambda: PGD(ThreatModel("l1", 3.0), 5, 1.0),
    "pgd_l0": lambda: PGD(ThreatModel("l0", 4), 5, 1.0),
    "pgd_unbounded": lambda: PGD(ThreatModel("l2", "inf"), 5, 0.1),
    "pgd_8bit": lambda: PGD(ThreatModel("linf", 0.05, levels=255), 5),
    "mifgsm": lambda: PGD(FIVE, 5, random_start=False, decay=1.0, loss=dlr),
    "pgd_nes": lambda: PGD(FIVE, 3, 0.02, False, estimator=NES(10, 0.01, block=4)),
    "pgd_nes_one_block": lambda: PGD(FIVE, 3, 0.02, False, estimator=NES(6, 0.01, 0.5, "ball"), plateau=2),
    "pgd_nes_l2": lambda: PGD(
        ThreatModel("l2", 0.4), 3, restarts=2, loss=margin, kappa=0.0, estimator=NES(8, 0.01, 0.9, "box", 4)
    ),
    "pgd_noise": lambda: PGD(FIVE, 1, 0.03, False, noise=0.02),
    "cascade": lambda: Cascade(
        FIVE, {"fgsm": PGD(steps=1, random_start=False), "pgd": PGD(steps=4), "nattack": NAttack(FIVE, 3, 12, 0.05)}
    ),
    "pgd_eot": lambda: PGD(FIVE, 4, estimator=Autograd(3)),
    "nattack": lambda: NAttack(FIVE, 4, 20, 0.05, block=7),
    "nattack_all_steps": lambda: NAttack(FIVE, 3, 10, 0.05, block=4, stop_at_hit=False),
    "nattack_l2": lambda: NAttack(ThreatModel("l2", 0.4), 4, 20, 0.05, space="pixel", latent=4, antithetic=True),
    "nattack_released": lambda: NAttack(FIVE, 5, 11, 0.05, schedule="mean", check_every=2, block=4),
}
FROM_FILES = {path.name: path for path in sorted(CONFIGS.glob("*.yaml"))}
NAMES = [*MADE, *FROM_FILES]
STOCHASTIC = {"random pgd": "pgd_eot", "random nattack": "nattack", "random nes": "pgd_nes"}


def attack_of(name: str) -> Attack:
    return MADE[name]() if name in MADE else configured(FROM_FILES[name])


every = pytest.mark.parametrize("name", NAMES)


def problem(name: str, count: int = 5, scale: float = 4.0) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = behind(attack_of(name), Small(scale=scale)), images(count, 7)
    return model, x, decided(model, x)


def assert_honest(attack: Attack, model: nn.Module, result: AttackResult, x: Tensor, y: Tensor) -> None:
    """Whatever a result says of itself is so."""
    threat, won = attack.threat, result.success
    assert threat.in_box(result.x_adv).all()
    assert threat.within(result.x_adv, x)[won].all()
    assert (decided(model, result.x_adv) != y)[won].all()
    torch.testing.assert_close(result.distance[won], threat.distance(result.x_adv, x)[won])
    assert (result.distance[won] <= threat.radius * (1 + 1e-6)).all()
    assert torch.equal(result.first_hit >= 0, won)
    assert (result.first_hit <= result.queries).all()
    assert (result.checks <= result.queries).all()
    assert (result.checks >= 0).all()
    assert (result.iterations >= 0).all()
    for row in range(len(x)):
        trace = result.trace[result.trace[:, 0] == row]
        if won[row]:
            inside = trace[trace[:, 3] <= threat.radius * (1 + 1e-6)]
            if getattr(attack, "minimizes_distance", False):  # a nearer one of the same forward may be kept
                assert inside[0, 2] >= result.first_hit[row]
            else:
                assert inside[0, 2] == result.first_hit[row]
            assert inside[-1, 3] == result.distance[row]
        assert (trace[:, 2].diff() > 0).all()


def test_configurations_are_enrolled() -> None:
    assert FROM_FILES
    for name, path in FROM_FILES.items():
        assert isinstance(configured(path), Attack), name


@every
def test_results_are_honest(name: str) -> None:
    model, x, y = problem(name, 12)
    attack = attack_of(name)
    result = attack(model, x, y)
    assert_honest(attack, model, result, x, y)
    assert result.x_adv.dtype == x.dtype


@every
def test_results_are_honest_in_float32(name: str) -> None:
    model, x, _ = problem(name, 12)
    model, x = model.float(), x.float()
    y = decided(model, x)
    attack = attack_of(name)
    result = attack(model, x, y)
    threat = attack.threat
    assert threat.within(result.x_adv, x)[result.success].all()
    assert (decided(model, result.x_adv) != y)[result.success].all()
    if math.isfinite(threat.radius):
        nothing = result.distance == torch.inf  # else what is returned is the nearest adversarial image at any radius
        assert threat.within(result.x_adv, x)[result.success | nothing].all()


@every
@pytest.mark.parametrize("budget", [0, 1, 37, 200, 1000, None])
def test_the_ledger_is_what_the_model_was_given(name: str, budget: int | None) -> None:
    inner, x, y = problem(name)
    model = counting(inner, x)
    attack = attack_of(name)
    result = attack(QueryOracle(model, len(x), budget=budget), x, y)
    if attack.access == Access.LABEL:  # it begins far from the image, where the nearest clean one says nothing
        assert result.queries.sum() == model.seen.sum()
        for row in range(len(x)):
            alone = counting(inner, x[row : row + 1])
            index = torch.tensor([row])
            found = attack(QueryOracle(alone, 1, budget=budget), x[index], y[index], index=index)
            assert found.queries.tolist() == alone.seen.tolist() == result.queries[index].tolist()
    else:
        assert torch.equal(result.queries, model.seen)
    assert budget is None or int(result.queries.max()) <= budget
    assert_honest(attack, inner, result, x, y)


@every
def test_a_budget_of_the_first_hit_finds_it_and_less_does_not(name: str) -> None:
    attack = attack_of(name)
    shape = torch.Size((3, 8, 8))
    if not isinstance(attack, IterativeAttack) or (attack.needs_whole_step and attack.cost(shape) > 1):
        pytest.skip("its steps are whole or not at all")
    model, x, y = problem(name, 12)
    unlimited = attack(model, x, y)
    for budget in sorted({*unlimited.first_hit.tolist(), *(unlimited.first_hit - 1).tolist()} - {-1, -2}):
        limited = attack(QueryOracle(model, 12, budget=budget), x, y)
        expected = unlimited.success & (unlimited.first_hit <= budget)
        assert torch.equal(limited.success, expected)
        assert torch.equal(limited.first_hit[expected], unlimited.first_hit[expected])


@pytest.mark.parametrize("name", [*NAMES, *STOCHASTIC])
def test_rows_are_the_same_alone_shuffled_and_in_any_pool(name: str) -> None:
    made = STOCHASTIC.get(name, name)
    (model, x, y), attack = problem(made, 6), attack_of(made)
    if name in STOCHASTIC:
        model = Noisy(model, 4, 0.02)
    index = torch.tensor([30, 2, 77, 5, 1000, 41])

    def run(rows: Tensor, chunk: int) -> AttackResult:
        oracle = QueryOracle(model, len(rows), chunk=chunk, budget=150)
        return attack(oracle, x[rows], y[rows], index=index[rows])

    whole = run(torch.arange(6), 64)
    orders = [torch.arange(6), torch.tensor([3, 0, 5, 1, 4, 2])]
    pools = [(orders[0], 1), (orders[0], 7), (orders[0], 1000), (orders[1], 7), (orders[1], 64)]
    for rows, chunk in [*pools, *((torch.tensor([row]), 64) for row in range(6))]:
        other = run(rows, chunk)
        for record in RECORDS:
            assert torch.equal(getattr(other, record), getattr(whole, record)[rows]), record
        torch.testing.assert_close(other.x_adv, whole.x_adv[rows], rtol=0, atol=1e-9)
        torch.testing.assert_close(other.distance, whole.distance[rows], rtol=0, atol=1e-9)


@every
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    model, x, y = problem(name)
    attack = attack_of(name)
    first, second = attack(model, x, y), attack(model, x, y)
    assert torch.equal(first.x_adv, second.x_adv)
    assert torch.equal(first.queries, second.queries)


@every
def test_flat_models_black_and_white_images(name: str) -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :4] + torch.tensor([5.0, 1, 0, -1], dtype=x.dtype)

    x = images(4, 7)
    x[0], x[1] = 0, 1
    attack = attack_of(name)
    for inner in (Flat(), Small()):
        model = behind(attack, inner)
        y = decided(model, x)
        result = attack(model, x, y)
        assert result.x_adv.isfinite().all()
        assert_honest(attack, model, result, x, y)
        assert not isinstance(inner, Flat) or not result.success.any()


@every
def test_targets(name: str) -> None:
    model, x, y = problem(name, 8)
    attack = attack_of(name)
    target = (y + 1) % 4
    result = attack(model, x, y, target)
    assert torch.equal(decided(model, result.x_adv)[result.success], target[result.success])
    assert torch.equal(result.first_hit >= 0, result.success)


@every
def test_too_little_access_is_refused(name: str) -> None:
    inner, x, y = problem(name)
    model = counting(inner, x)
    attack = attack_of(name)
    for access in Access:
        if access < attack.access:
            with pytest.raises(AccessDenied, match=attack.access.name):
                attack(QueryOracle(model, 5, access), x, y)
            assert not model.seen.any()
    attack(QueryOracle(model, 5, attack.access), x, y)


@every
def test_the_model_is_left_alone(name: str) -> None:
    model, x, y = problem(name)
    model.train()
    before = copy.deepcopy(model.state_dict())
    attack_of(name)(model, x, y)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@every
def test_a_radius_of_zero_breaks_nothing_that_was_right(name: str) -> None:
    model, x, y = problem(name)
    attack = attack_of(name)
    zero = attack.with_threat(dataclasses.replace(attack.threat, eps=0, levels=None))
    result = zero(QueryOracle(model, 5, budget=100), x, y)
    assert not result.success.any()
    assert torch.equal(result.x_adv, x)
    if attack.access == Access.GRADIENT:
        wrong = zero(QueryOracle(model, 5), x, (y + 1) % 4)
        assert wrong.success.all()
        assert (wrong.distance == 0).all()


@every
@pytest.mark.parametrize("stop_at_hit", [True, False])
def test_the_caller_is_told_of_each_row_once(name: str, stop_at_hit: bool) -> None:
    model, x, y = problem(name, 9)
    attack = attack_of(name)
    if isinstance(attack, IterativeAttack):
        attack.stop_at_hit = stop_at_hit
    told: list[tuple[Tensor, AttackResult]] = []
    final = attack(QueryOracle(model, 9, chunk=40), x, y, finished=lambda rows, result: told.append((rows, result)))
    assert sorted(torch.cat([rows for rows, _ in told]).tolist()) == list(range(9))
    for rows, result in told:
        for record in (*RECORDS, "x_adv", "distance"):
            assert torch.equal(getattr(result, record), getattr(final, record)[rows])


@every
def test_running_on_after_a_hit_changes_no_first_hit(name: str) -> None:
    model, x, y = problem(name, 9)
    attack = attack_of(name)
    if not isinstance(attack, IterativeAttack):
        pytest.skip("it ends at its first hit")
    attack.stop_at_hit = True
    stopped = attack(model, x, y)
    attack.stop_at_hit = False
    running = attack(model, x, y)
    assert torch.equal(stopped.success, running.success)
    assert torch.equal(stopped.first_hit, running.first_hit)
    assert torch.equal(stopped.iterations[stopped.success], running.iterations[stopped.success])
    assert (running.queries >= stopped.queries).all()


@every
def test_no_images(name: str) -> None:
    model, x, y = problem(name)
    result = attack_of(name)(model, x[:0], y[:0])
    assert len(result) == 0


@every
def test_perturb_stays_in_the_ball(name: str) -> None:
    model, x, y = problem(name)
    attack = attack_of(name)
    if not isinstance(attack, IterativeAttack):
        pytest.skip("several attacks have no one last point")
    out = attack.perturb(model, x, y)
    assert attack.threat.within(out, x).all()
    assert out.shape == x.shape
