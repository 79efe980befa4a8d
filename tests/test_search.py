"""What a search offers, keeps and charges, with attacks made for the test."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.climb import WIDE, Climb, Ramp, grey, zeros
from contracts.nets import Counting, Linear
from torch import Tensor, nn

from lit_adv.attack import Search, State
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")


# what is kept


@pytest.mark.parametrize("label", [False, True])
def test_the_first_hit_ends_the_row_and_is_noted(label: bool) -> None:
    attack = Climb([[0.0, 0.1], [0.15, 0.19], [0.19, 0.25], [0.3, 0.3]], WIDE, label)
    oracle = QueryOracle(Ramp(), 1)
    result = attack(oracle, grey(), zeros())
    assert result.success.tolist() == [True]
    assert result.first_hit.tolist() == [6]
    assert result.queries.tolist() == [6]
    assert result.iterations.tolist() == [2]
    assert result.checks.tolist() == [0]
    torch.testing.assert_close(result.x_adv, grey() + 0.25)
    torch.testing.assert_close(result.distance, torch.tensor([0.25], dtype=torch.float64))
    torch.testing.assert_close(result.trace, torch.tensor([[0, 2, 6, 0.25]], dtype=torch.float64))


def test_the_earliest_hit_of_a_block_counts() -> None:
    result = Climb([[0.1, 0.3, 0.25, 0.35]], WIDE)(Ramp(), grey(), zeros())
    assert result.first_hit.tolist() == [2]
    assert result.queries.tolist() == [4]
    torch.testing.assert_close(result.distance, torch.tensor([0.3], dtype=torch.float64))


def test_first_hit_counts_only_what_was_asked() -> None:
    attack = Climb([[0.3, 0.1, 0.3, 0.1, 0.35]], WIDE, mask=[False, True, False, True, True])
    counter = Counting(Ramp(), grey())
    result = attack(counter, grey(), zeros())
    assert result.first_hit.tolist() == [3]
    assert result.queries.tolist() == counter.seen.tolist() == [3]
    torch.testing.assert_close(result.distance, torch.tensor([0.35], dtype=torch.float64))


@pytest.mark.parametrize("label", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("minimizes", [False, True])
def test_what_nobody_asks_is_no_question(label: bool, samples: int, minimizes: bool) -> None:
    answers: list[Tensor] = []

    class Strict(Ramp):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x), "a model need not bear an empty batch"
            return super().forward(x)

    class Idle(Climb):
        def step(self, search: Search, state: State) -> State:
            x = (state.x0 + 0.3)[:, None].expand(-1, samples, -1, -1, -1)
            asked = torch.full((len(state), samples), bool(state.t[0] == 1))
            answers.append((search.label if label else search.scores)(x, state, asked=asked))
            if label:
                return state
            state.x = state.x0 + 0.3
            return state

    attack = Idle([[0.0] * samples] * 3, WIDE, label, minimizes_distance=minimizes)
    result = attack(QueryOracle(Strict(), 1), grey(), zeros())
    assert result.success.all()
    assert result.queries.tolist() == [samples]
    assert result.first_hit.tolist() == [1]
    if label:
        assert (answers[0] == -1).all()
        assert answers[0].shape == answers[1].shape == (1, samples)
    else:
        assert answers[0].isnan().all()


def test_without_stopping_the_first_hit_is_noted_and_the_last_kept() -> None:
    values = [[0.1, 0.25], [0.1, 0.1], [0.3, 0.22], [0.1, 0.1]]
    result = Climb(values, WIDE, stop_at_hit=False)(Ramp(), grey(), zeros())
    assert result.first_hit.tolist() == [2]
    assert result.iterations.tolist() == [0]
    assert result.queries.tolist() == [9]  # the last candidate is asked once more
    assert result.checks.tolist() == [1]
    torch.testing.assert_close(result.distance, torch.tensor([0.3], dtype=torch.float64))
    torch.testing.assert_close(result.x_adv, grey() + 0.3)
    assert result.trace[:, 2].tolist() == [2, 5]


def test_minimum_norm_attacks_keep_the_nearest_hit() -> None:
    values = [[0.35, 0.3], [0.1, 0.1], [0.22, 0.21], [0.25, 0.1]]
    result = Climb(values, WIDE, minimizes_distance=True, stop_at_hit=False)(Ramp(), grey(), zeros())
    assert result.queries.tolist() == [8]
    assert result.first_hit.tolist() == [1]  # though the second of that block is nearer, and kept
    torch.testing.assert_close(result.distance, torch.tensor([0.21], dtype=torch.float64))
    torch.testing.assert_close(result.x_adv, grey() + 0.21)
    torch.testing.assert_close(result.trace[:, 3], torch.tensor([0.3, 0.21], dtype=torch.float64))


def test_a_hit_outside_the_ball_is_kept_as_such() -> None:
    values = [[0.3], [0.25], [0.35], [0.1]]
    attack = Climb(values, ThreatModel("linf", 0.22), minimizes_distance=True)
    result = attack(Ramp(), grey(), zeros())
    assert result.success.tolist() == [False]
    assert result.first_hit.tolist() == [-1]
    assert result.iterations.tolist() == [4]
    torch.testing.assert_close(result.distance, torch.tensor([0.25], dtype=torch.float64))
    later = Climb([[0.3], [0.21], [0.25]], ThreatModel("linf", 0.22))(Ramp(), grey(), zeros())
    assert later.success.tolist() == [True]
    assert later.first_hit.tolist() == [2]
    torch.testing.assert_close(later.distance, torch.tensor([0.21], dtype=torch.float64))


def test_a_row_that_finds_nothing_keeps_its_last_candidate_inside() -> None:
    result = Climb([[0.1], [0.9]], ThreatModel("linf", 0.15))(Ramp(2.0), grey(), zeros())
    assert not result.success.any()
    assert result.distance.tolist() == [math.inf]
    torch.testing.assert_close(result.x_adv, grey() + 0.15)


@pytest.mark.parametrize("minimizes", [False, True])
def test_hits_outside_the_box_do_not_count(minimizes: bool) -> None:
    """0.75 + 0.3 is no image; 0.75 + 0.2 is one."""
    model = Ramp(0.9)
    outside = Climb([[0.3]], WIDE, minimizes_distance=minimizes)(model, grey(value=0.75), zeros())
    assert outside.x_adv.max() <= 1
    result = Climb([[0.3], [0.2], [0.26]], WIDE, minimizes_distance=minimizes)(model, grey(value=0.75), zeros())
    assert result.success.tolist() == [True]
    assert result.first_hit.tolist() == [2]
    torch.testing.assert_close(result.x_adv, grey(value=0.95))


def test_hits_outside_the_box_do_not_replace_nearer_ones() -> None:
    """One pixel far below the box is nearer in l2 than the honest hit."""

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            won = ((x[:, 0, 0, 0] < -0.05) | (x.flatten(1).mean(1) > 0.5)).double()
            return torch.stack([0.5 - won, won - 0.5], 1)

    class Two(Climb):
        def step(self, search: Search, state: State) -> State:
            good = state.x0 + 0.3
            bad = state.x0.clone()
            bad[:, 0, 0, 0] -= 0.4
            search.scores(torch.stack([bad, good, bad], 1), state)
            state.x = good
            return state

    attack = Two([[0.0, 0, 0]] * 2, ThreatModel("l2", 2.0), minimizes_distance=True)
    result = attack(Corner(), grey(), zeros())
    assert result.success.tolist() == [True]
    torch.testing.assert_close(result.x_adv, grey() + 0.3)


@pytest.mark.parametrize("label", [False, True])
def test_nan_is_no_hit(label: bool) -> None:
    class Sick(Ramp):
        def forward(self, x: Tensor) -> Tensor:
            answer = super().forward(x)
            return torch.where((x.flatten(1).mean(1) > 0.45)[:, None], math.nan, answer)

    result = Climb([[0.0], [0.1], [0.2], [0.3]], WIDE, label)(Sick(), grey(), zeros())
    assert not result.success.any()
    assert result.nonfinite >= 2


def test_targets_and_refusals() -> None:
    class Three(Defense):
        num_classes, reject = 2, 2

        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            return torch.stack([0.5 - mean, mean - 0.5, torch.where((mean > 0.55) & (mean < 0.7), 9.0, -9.0)], 1)

    values = [[0.26], [0.35], [0.41]]
    result = Climb(values, ThreatModel("linf", 0.5))(Three(), grey(), zeros())
    assert result.first_hit.tolist() == [3]
    aimed = Climb(values, ThreatModel("linf", 0.5))(Three(), grey(), zeros(), zeros() + 1)
    assert aimed.first_hit.tolist() == [3]


def test_candidates_are_rounded_where_levels_are_given() -> None:
    threat = ThreatModel("linf", 0.3, levels=10)
    result = Climb([[0.18], [0.23], [0.26]], threat)(Ramp(0.55), grey(), zeros())
    assert result.first_hit.tolist() == [3]
    torch.testing.assert_close(result.x_adv, grey(value=0.6))
    torch.testing.assert_close(result.distance, torch.tensor([0.3], dtype=torch.float64))


# what is charged


def test_a_row_without_a_hit_has_its_last_candidate_checked() -> None:
    class Blind(Climb):
        def step(self, search: Search, state: State) -> State:
            state.x = state.x0 + self.values[state.t][:, :1, None, None]
            search.scores(state.x0, state, candidate=False)
            return state

    counter = Counting(Ramp(), grey(2))
    result = Blind([[0.1], [0.3]], WIDE)(QueryOracle(counter, 2), grey(2), zeros(2))
    assert result.success.tolist() == [True, True]
    assert result.first_hit.tolist() == result.queries.tolist() == [3, 3]
    assert result.checks.tolist() == [1, 1]
    assert result.iterations.tolist() == [2, 2]
    short = Blind([[0.1], [0.3]], WIDE)(QueryOracle(Ramp(), 1, budget=2), grey(), zeros())
    assert not short.success.any()
    assert short.queries.tolist() == [2]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("budget", range(12))
def test_budgets_end_steps(budget: int, whole: bool) -> None:
    values = [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1], [0.1, 0.3, 0.1]]
    counter = Counting(Ramp(), grey())
    attack = Climb(values, WIDE, needs_whole_step=whole)
    result = attack(QueryOracle(counter, 1, budget=budget), grey(), zeros())
    assert result.queries.tolist() == counter.seen.tolist()
    assert int(result.queries) <= budget
    assert bool(result.success) == (budget >= (9 if whole else 8))
    if not whole:
        assert int(result.queries) == min(budget, 9)
        assert int(result.first_hit) == (8 if budget >= 8 else -1)


def test_oracles_with_a_history_go_on_from_it() -> None:
    oracle = QueryOracle(Ramp(), 1, budget=5)
    oracle.scores(grey(), zeros())
    result = Climb([[0.1, 0.1], [0.1, 0.3], [0.3, 0.3]], WIDE)(oracle, grey(), zeros())
    assert result.queries.tolist() == [5]
    assert result.first_hit.tolist() == [5]


class Flaky(Defense):
    """A hundredth of the answers is wrong, wherever the image lies; a real change is wrong in 90 of 100."""

    stochastic, num_classes = True, 2

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        assert draws is not None
        chance = torch.where(x.flatten(1).mean(1) > 0.5, 0.9, 0.05)
        wrong = (draws.uniform() < chance).double()
        return torch.stack([0.5 - wrong, wrong - 0.5], 1)


def test_hits_by_chance_are_not_confirmed_and_real_ones_are() -> None:
    x, values = grey(40), [[0.0]] * 20 + [[0.3]] * 10
    oracle = QueryOracle(Flaky(), 40)
    result = Climb(values, WIDE)(oracle, x, zeros(40))
    assert result.success.all()
    assert (result.iterations >= 20).all()
    assert (result.x_adv.flatten(1).mean(1) > 0.5).all()
    assert (result.queries >= 21 + 31).all()
    assert torch.equal(result.first_hit, result.queries)
    assert ((result.queries - result.iterations - 1) % 31 == 0).all()


def test_confirmations_stand_outside_the_papers_arithmetic() -> None:
    """Twenty images of chance, asked once each: the rest are confirmations, and a check of the last candidate."""
    result = Climb([[0.0]] * 20, WIDE)(QueryOracle(Flaky(), 40), grey(40), zeros(40))
    lost = ~result.success
    assert (result.queries[lost] > 31).any()
    assert ((result.queries - result.checks)[lost] == 20).all()


def test_a_hit_whose_confirmation_cannot_be_paid_is_none() -> None:
    counted = Counting(Linear(2, (1, 2, 2)), grey())

    class Wrong(Defense):
        stochastic, num_classes = True, 2

        def __init__(self) -> None:
            super().__init__()
            self.counter = counted

        def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
            self.counter(x)
            return torch.tensor([[0.0, 5.0]], dtype=x.dtype).expand(len(x), 2)

    for budget in (1, 31, 32):
        counted.seen.zero_()
        result = Climb([[0.0]], WIDE)(QueryOracle(Wrong(), 1, budget=budget), grey(), zeros())
        assert bool(result.success) == (budget == 32)
        assert result.queries.tolist() == counted.seen.tolist()
        assert int(result.queries) <= budget


def test_hits_of_a_stand_in_must_be_confirmed_by_the_model() -> None:
    result = Climb([[0.1], [0.15], [0.25]], WIDE)(QueryOracle(Ramp(), 1, fast=Ramp(0.42)), grey(), zeros())
    assert result.first_hit.tolist() == result.queries.tolist() == [5]  # 0.45 claimed, refuted; 0.55 claimed, confirmed
    torch.testing.assert_close(result.x_adv, grey(value=0.55))


class Packed(Climb):
    """Asks the same images as :class:`Climb`, handed over without those left out."""

    def step(self, search: Search, state: State) -> State:
        assert self.mask is not None
        x = state.x0.unsqueeze(1) + self.values[state.t][:, :, None, None, None]
        asked = torch.tensor(self.mask).expand(len(state), -1)
        (search.label if self.by_label else search.scores)(x[asked], state, asked=asked)
        state.x = x[:, -1]
        return state


@pytest.mark.parametrize("label", [False, True])
@pytest.mark.parametrize("budget", [None, 1, 2, 3, 5])
def test_packed_images_are_asked_and_offered_as_padded_ones(label: bool, budget: int | None) -> None:
    values = [[0.1, 0.35, 0.05, 0.1], [0.12, 0.3, 0.22, 0.25]]
    mask = [True, False, True, True]
    x = grey(3, 0.3)
    x[1] = 0.2
    attacks = (Climb(values, WIDE, label, mask), Packed(values, WIDE, label, mask))
    padded, packed = (attack(QueryOracle(Ramp(), 3, budget=budget), x, zeros(3)) for attack in attacks)
    for record in ("success", "queries", "first_hit", "x_adv", "distance", "checks", "iterations", "trace"):
        assert torch.equal(getattr(padded, record), getattr(packed, record)), record


def test_single_samples_may_be_checks() -> None:
    class Checking(Climb):
        def step(self, search: Search, state: State) -> State:
            x = state.x0.unsqueeze(1) + self.values[state.t][:, :, None, None, None]
            search.scores(x, state, check=torch.tensor([True, False, False]).expand(len(state), -1))
            state.x = x[:, -1]
            return state

    result = Checking([[0.0, 0.01, 0.02]] * 4, WIDE)(QueryOracle(Ramp(), 2, known_right=True), grey(2), zeros(2))
    assert result.queries.tolist() == [13, 13]
    assert result.checks.tolist() == [5, 5]  # one a step, and the last look
    short = Checking([[0.0, 0.01, 0.02]] * 4, WIDE, needs_whole_step=False)
    cut = short(QueryOracle(Ramp(), 2, budget=4, known_right=True), grey(2), zeros(2))
    assert cut.queries.tolist() == [4, 4]
    assert cut.checks.tolist() == [2, 2]


def test_a_bare_call_looks_at_the_clean_image_first() -> None:
    x = grey(3, 0.3)
    x[1] = 0.7  # classified as 1 from the start
    values = [[0.1], [0.15]]
    elsewhere = Climb(values, WIDE, looks_first=True)
    result = elsewhere(Ramp(), x, zeros(3))
    assert result.success.tolist() == [False, True, False]
    assert result.distance[1] == 0
    assert result.queries.tolist() == [4, 1, 4]
    assert result.checks.tolist() == [2, 1, 2]
    assert result.first_hit[1] == 1
    assert elsewhere(QueryOracle(Ramp(), 3, known_right=True), x, zeros(3)).queries.tolist() == [3, 1, 3]
    assert elsewhere(QueryOracle(Ramp(), 3, budget=0), x, zeros(3)).queries.tolist() == [0, 0, 0]
    told: list[int] = []
    elsewhere(Ramp(), x, zeros(3), finished=lambda rows, ended: told.extend(rows.tolist()))
    assert sorted(told) == [0, 1, 2]


def test_what_was_counted_is_reported_as_a_share() -> None:
    class Tallying(Climb):
        def step(self, search: Search, state: State) -> State:
            search.count("odd rows", state.rows % 2 == 1)
            return super().step(search, state)

    result = Tallying([[0.01]] * 5, WIDE)(Ramp(), grey(3), zeros(3))
    assert result.counts == {"odd rows": (5, 15)}
