"""GenAttack: selection, crossover and mutation against their probabilities, its arithmetic, and what it finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.nets import Counting, Recording, Small, decided, images, near_boundary, safe
from scipy import stats
from torch import Tensor, nn

from lit_adv.attacks import GenAttack
from lit_adv.attacks.gen_attack import GenAttackState, fresh, log_odds, mutations
from lit_adv.losses import margin
from lit_adv.oracle import QueryOracle
from lit_adv.search import Search
from lit_adv.threat import ThreatModel

EPS = ThreatModel("linf", 0.05)
pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")


def right(model: nn.Module, rows: int) -> QueryOracle:
    """An oracle whose caller knows that the clean images are classified rightly."""
    return QueryOracle(model, rows, known_right=True)


def begun(attack: GenAttack, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Search, GenAttackState]:
    search = Search(attack, right(model, len(x)), x, y, None, torch.arange(len(x)))
    return search, attack.start(search, torch.arange(len(x)))


@pytest.mark.parametrize(("steps", "population", "block"), [(1, 2, 32), (7, 4, 32), (5, 6, 2), (4, 9, 4), (3, 5, 1)])
def test_a_generation_asks_about_its_children(steps: int, population: int, block: int) -> None:
    model, x, y = safe()
    counting = Counting(model, x)
    result = GenAttack(EPS, steps, population, block=block)(right(counting, 3), x, y)
    assert result.queries.tolist() == counting.seen.tolist() == [steps * (population - 1) + 1] * 3
    assert not result.checks.any()
    assert result.iterations.tolist() == [steps] * 3


def test_blocks_do_not_matter() -> None:
    x, model = images(6), Small(scale=4.0)
    y = decided(model, x)
    whole, parts = (GenAttack(EPS, 30, 7, 0.2, 0.5, block=block)(model, x, y) for block in (32, 3))
    assert torch.equal(whole.first_hit, parts.first_hit)
    torch.testing.assert_close(whole.x_adv, parts.x_adv)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("reject", [None, 4])
def test_fitness_is_the_log_of_the_odds(targeted: bool, reject: int | None) -> None:
    scores = 3 * torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    target = (y + 1) % 4 if targeted else None
    shares = scores.softmax(-1)
    found = log_odds(scores, y, target, reject)
    for row in range(6):
        if target is not None:
            own = shares[row, :, target[row]]
            expected = own.log() - (1 - own).log()
        else:
            own = shares[row, :, y[row]] + (0 if reject is None else shares[row, :, reject])
            expected = (1 - own).log() - own.log()
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_mutations_are_rare_and_uniform(rate: float) -> None:
    uniform = torch.rand(4, 5, 1, 100, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = fresh(uniform)
    correlation = torch.corrcoef(torch.stack([parts.flatten(), uniform.flatten()]))[0, 1]
    assert abs(correlation) < 5 / uniform.numel() ** 0.5 + 1 / 256
    changes = mutations(parts, torch.full((4,), rate))
    happened = changes[changes != 0]
    assert abs(len(happened) / changes.numel() - rate) < 5 * (rate / changes.numel()) ** 0.5
    assert stats.kstest(happened.flatten().numpy(), "uniform", args=(-1, 2)).pvalue > 1e-4


def test_the_first_generation_is_uniform_in_the_ball() -> None:
    model, x, y = safe(count=40)
    _, state = begun(GenAttack(EPS, population=5), model, x, y)
    assert stats.kstest(state.members.flatten().numpy(), "uniform", args=(-0.05, 0.1)).pvalue > 1e-4
    assert not torch.equal(state.members[0, 0], state.members[0, 1])


def test_the_first_generation_may_be_made_of_mutations_of_the_image() -> None:
    model, x, y = safe(count=40)
    _, state = begun(GenAttack(EPS, population=5, mutation_rate=0.2, init="mutated"), model, x, y)
    assert state.members.abs().max() <= 0.05
    assert (state.members != 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert not torch.equal(state.members[0, 0], state.members[0, 1])


def test_parents_and_their_values_are_drawn_by_fitness() -> None:
    model, x, y = safe(count=300)
    attack = GenAttack(EPS, population=2, alpha=1e-12, temperature=0.5)
    search, state = begun(attack, model, x, y)
    state.members[:, 0], state.members[:, 1] = -0.01, 0.02
    fitness = torch.tensor([[0.7, 0.4]], dtype=torch.float64).repeat(300, 1)
    share = (fitness[0] / 0.5).softmax(0)
    rows = torch.arange(300)
    members = attack._children(search.draws(state), state, rows, fitness, fitness.argmax(1))
    assert (members[:, 0] == -0.01).all()
    near = (members[:, 1] + 0.01).abs() < 1e-9
    assert (near | ((members[:, 1] - 0.02).abs() < 1e-9)).all()
    of_first = near.flatten(1).double().mean(1)
    both = (of_first == 1).double().mean()  # two times the same parent
    assert both.item() == pytest.approx(share[0].item() ** 2, abs=5 * 0.5 / 300**0.5)
    mixed = of_first[(of_first > 0) & (of_first < 1)]
    assert mixed.mean().item() == pytest.approx(share[0].item(), abs=0.02)


def test_mutations_stay_within_alpha_eps() -> None:
    model, x, y = safe(count=20)
    attack = GenAttack(EPS, population=3, mutation_rate=0.4, alpha=0.5)
    search, state = begun(attack, model, x, y)
    state.members[:] = 0.01
    fitness = torch.zeros(20, 3, dtype=torch.float64)
    members = attack._children(search.draws(state), state, torch.arange(20), fitness, fitness.argmax(1))
    changes = members[:, 1:] - 0.01
    assert changes.abs().max() <= 0.025 + 1e-12
    assert changes.abs().max() > 0.024
    assert (changes != 0).double().mean().item() == pytest.approx(0.4, abs=0.02)


def test_the_best_fitness_never_falls_and_belongs_to_the_elite() -> None:
    model, x, y = safe()
    attack = GenAttack(EPS, 40, 5, 0.2, 0.5)
    search, state = begun(attack, model, x, y)
    best = torch.full((3,), -torch.inf, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(40):
            attack.step(search, state)
            state.t += 1
            fitness = state.fitness[:, 0]
            assert (fitness >= best).all()
            torch.testing.assert_close(log_odds(model(state.x), y), fitness)
            best = fitness.clone()


def test_every_query_lies_in_ball_and_box() -> None:
    model, x, y = safe(count=1)
    x[0, 0], x[0, 1] = 0, 1
    recording = Recording(model)
    GenAttack(EPS, 60, 4, 0.5, 2.0)(recording, x, y)
    given = torch.cat(recording.given)
    assert EPS.within(given, x.expand_as(given)).all()


def test_adaptive_strength_follows_the_plateaus() -> None:
    model, x, y = safe(count=4)
    attack = GenAttack(EPS, mutation_rate=0.1, alpha=0.15, adaptive=True)
    _, state = begun(attack, model, x, y)
    state.t = torch.tensor([9, 10, 10, 500])
    state.plateaus = torch.tensor([0, 0, 3, 60])
    rate, reach = attack._strength(state, torch.arange(4))
    assert rate.tolist() == pytest.approx([1.0, 0.5, 0.5 * 0.9**3, 0.1])
    assert reach.tolist() == pytest.approx([0.05 * 0.4, 0.05 * 0.4, 0.05 * 0.4 * 0.9**3, 0.05 * 0.15])
    fixed = GenAttack(EPS, mutation_rate=0.1, alpha=0.15)._strength(state, torch.arange(4))
    assert fixed[0].tolist() == pytest.approx([0.1] * 4)


def test_plateaus_come_after_100_or_300_generations() -> None:
    model, x, y = safe(count=2)
    attack = GenAttack(EPS, adaptive=True)
    _, state = begun(attack, model, x, y)
    state.lead = torch.tensor([[-0.3, -0.9, -0.8, -0.7], [-0.5, -0.9, -0.8, -0.7]], dtype=torch.float64)
    seen = []
    for _ in range(305):
        attack._notice_plateaus(state, torch.arange(2))
        seen.append(state.plateaus.tolist())
    # the first generation is progress; then more than 100, or 300, without any
    assert [row[0] for row in seen].index(1) == 101
    assert [row[0] for row in seen].index(2) == 202
    assert [row[1] for row in seen].index(1) == 301


def test_a_latent_perturbation_is_smooth() -> None:
    model, x, y = safe(count=2)
    attack = GenAttack(EPS, 20, 4, 0.5, latent=4)
    _, state = begun(attack, model, x, y)
    assert state.members.shape == (2, 4, 3, 4, 4)
    result = attack(model, x, y)
    assert result.x_adv.isfinite().all()
    assert EPS.within(result.x_adv, x).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_finds_what_exists_on_a_linear_model(targeted: bool) -> None:
    model, x, y, distance = near_boundary(4, "linf")
    target = y + 1 if targeted else None
    won = GenAttack(ThreatModel("linf", 1.25 * distance), 1000, 6, 0.05, 1.0)(model, x, y, target)
    assert won.success.all()
    lost = GenAttack(ThreatModel("linf", 0.95 * distance), 100, 6, 0.05, 1.0)(model, x, y, target)
    assert not lost.success.any()


def test_answers_that_are_no_numbers_rank_last_or_end_the_search() -> None:
    class Broken(nn.Module):
        """Answers the first time, then NaN to some images."""

        def __init__(self, share: int) -> None:
            super().__init__()
            self.share, self.asked = share, False

        def forward(self, x: Tensor) -> Tensor:
            total = x.flatten(1).sum(1)
            lost = ((total * 1e6).long() % 4 < self.share) & self.asked
            self.asked = True
            return torch.where(lost[:, None], torch.nan, torch.stack([total, -total], 1))

    x, y = 0.2 + 0.6 * images(5), torch.zeros(5, dtype=torch.int64)
    some = GenAttack(EPS, 30, 4, 0.3)(Broken(2), x, y)
    assert some.x_adv.isfinite().all()
    assert not some.success.any()
    none = GenAttack(EPS, 30, 4, 0.3)(Broken(4), x, y)
    assert none.queries.tolist() == [1 + 4] * 5


def test_another_loss_and_an_adaptive_run() -> None:
    x, model = images(5), Small(scale=4.0)
    y = decided(model, x)
    threat = ThreatModel("linf", 0.1)
    for attack in (GenAttack(threat, 60, 6, 0.1, loss=margin), GenAttack(threat, 60, 6, 0.1, adaptive=True)):
        assert attack(model, x, y).success.any()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"threat": ThreatModel("l2", 3.0)}, "l2"),
        ({"threat": ThreatModel("linf", "inf")}, "eps"),
        ({"steps": 0}, "steps"),
        ({"block": 0}, "block"),
        ({"latent": 0}, "latent"),
        ({"population": 1}, "population"),
        ({"mutation_rate": 0.0}, "mutation_rate"),
        ({"mutation_rate": 1.5}, "mutation_rate"),
        ({"alpha": 0.0}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GenAttack(**arguments)
