"""The loop of all iterated attacks: what is offered, kept, charged, ended and told, with attacks made for the test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from contracts.nets import Counting, Linear, Noisy, Small, decided, images
from torch import Tensor, nn

from lit_adv.attack import AttackResult, IterativeAttack, Search, State, check_images, check_labels
from lit_adv.attacks import PGD, NAttack
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.oracle import Access, AccessDenied, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")


class Ramp(nn.Module):
    """Class 1 where the mean of the image reaches ``level``; its logits cross there."""

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level = level
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        gap = self.weight * (x.flatten(1).mean(1) - self.level) * 10
        return torch.stack([-gap, gap], 1)


class Climb(IterativeAttack):
    """Step t asks images ``values[t]`` above the clean one, one or several at once."""

    access = Access.PROBS

    def __init__(
        self,
        values: list[list[float]],
        threat: ThreatModel,
        label: bool = False,
        mask: list[bool] | None = None,
        **settings: object,
    ) -> None:
        self.threat, self.values, self.steps = threat, torch.tensor(values, dtype=torch.float64), len(values)
        self.by_label, self.mask = label, mask
        self.access = Access.LABEL if label else Access.PROBS
        for name, value in settings.items():
            setattr(self, name, value)

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self.values.shape[1]

    def start(self, search: Search, rows: Tensor) -> State:
        return State(**search.fresh(rows))

    def step(self, search: Search, state: State) -> State:
        x = state.x0.unsqueeze(1) + self.values[state.t][:, :, None, None, None]
        asked = None if self.mask is None else torch.tensor(self.mask).expand(len(state), -1)
        (search.label if self.by_label else search.scores)(x, state, asked=asked)
        state.x = x[:, -1]
        return state


def grey(count: int = 1, value: float = 0.3) -> Tensor:
    return torch.full((count, 1, 2, 2), value, dtype=torch.float64)


def zeros(count: int = 1) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


WIDE = ThreatModel("linf", 0.4)


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
def test_what_nobody_asks_is_no_question(label: bool) -> None:
    class Strict(Ramp):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x), "a model need not bear an empty batch"
            return super().forward(x)

    attack = Climb([[0.1], [0.3]], WIDE, label, mask=[False])
    result = attack(QueryOracle(Strict(), 1), grey(), zeros())
    assert result.queries.tolist() == result.checks.tolist() == [1]


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
    result = Climb(values, WIDE, minimizes_distance=True)(Ramp(), grey(), zeros())
    assert result.queries.tolist() == [8]
    assert result.first_hit.tolist() == [2]  # the nearest of its block
    torch.testing.assert_close(result.distance, torch.tensor([0.21], dtype=torch.float64))
    torch.testing.assert_close(result.x_adv, grey() + 0.21)
    torch.testing.assert_close(result.trace[:, 3], torch.tensor([0.3, 0.21], dtype=torch.float64))


def test_a_hit_outside_the_ball_is_kept_as_such() -> None:
    values = [[0.3], [0.25], [0.35], [0.1]]
    result = Climb(values, ThreatModel("linf", 0.22))(Ramp(), grey(), zeros())
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


# rows, pools and callers


@dataclass(kw_only=True)
class Places(State):
    start: Tensor


class Restarted(IterativeAttack):
    """Every start draws its place; a hit needs a draw beyond 1.5."""

    access = Access.PROBS
    steps, restarts = 3, 6

    def __init__(self, seed: int = 0, **settings: object) -> None:
        self.threat, self.seed = ThreatModel("linf", "inf"), seed
        self.starts: list[tuple[int, float]] = []
        for name, value in settings.items():
            setattr(self, name, value)

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return 1

    def start(self, search: Search, rows: Tensor) -> State:
        place = search.starting_draws(rows).normal(dtype=torch.float64)
        self.starts += list(zip(rows.tolist(), place.tolist(), strict=True))
        return Places(**search.fresh(rows), start=place)

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, Places)
        moved = (state.t >= 1) & (state.start > 1.0)
        state.x = state.x0 + torch.where(moved, 0.3, 0.0).double()[:, None, None, None]
        search.scores(state.x, state)
        return state


def test_restarts_begin_anew_and_add_up() -> None:
    attack = Restarted()
    result = attack(Ramp(), grey(30), zeros(30))
    starts = [[place for row, place in attack.starts if row == i] for i in range(30)]
    for i, places in enumerate(starts):
        assert len(set(places)) == len(places) <= 6
        lost = len(places) - 1 if result.success[i] else 6
        assert bool(result.success[i]) == (places[-1] > 1.0)
        assert all(place <= 1.0 for place in places[:lost])
        per_start = 4  # three steps and a check
        assert int(result.queries[i]) == lost * per_start + 2 * int(result.success[i])
        assert int(result.iterations[i]) == lost * 3 + int(result.success[i])
        assert int(result.checks[i]) == lost
    assert 0 < result.success.sum() < 30


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_pools_of_any_width_give_one_result(chunk: int) -> None:
    plain = Restarted()(QueryOracle(Ramp(), 30, chunk=64), grey(30), zeros(30))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    other = Restarted()(QueryOracle(Ramp(), 30, chunk=chunk), grey(30), zeros(30), index=order)
    for name in ("success", "queries", "first_hit", "iterations", "checks", "distance"):
        assert torch.equal(getattr(other, name), getattr(plain, name)[order])
    assert not torch.equal(Restarted(1)(Ramp(), grey(30), zeros(30)).iterations, plain.iterations)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("stop_at_hit", [True, False])
@pytest.mark.parametrize("budget", [None, 9, 0])
def test_the_caller_is_told_of_each_row_once_with_its_final_result(
    chunk: int, stop_at_hit: bool, budget: int | None
) -> None:
    told: list[tuple[Tensor, AttackResult]] = []
    oracle = QueryOracle(Ramp(), 20, chunk=chunk, budget=budget)
    final = Restarted(stop_at_hit=stop_at_hit)(
        oracle, grey(20), zeros(20), finished=lambda rows, result: told.append((rows, result))
    )
    rows = torch.cat([rows for rows, _ in told])
    assert sorted(rows.tolist()) == list(range(20))
    for some, result in told:
        assert len(result) == len(some)
        for name in ("x_adv", "success", "distance", "queries", "checks", "first_hit", "iterations"):
            assert torch.equal(getattr(result, name), getattr(final, name)[some])
        for place, row in enumerate(some.tolist()):
            ours = result.trace[result.trace[:, 0] == place, 1:]
            assert torch.equal(ours, final.trace[final.trace[:, 0] == row, 1:])


def test_forwards_stay_full_as_rows_finish() -> None:
    sizes: list[int] = []

    class Watched(Ramp):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    x = torch.cat([grey(50, 0.6), grey(10, 0.3)])[torch.randperm(60)]
    Climb([[0.0]] * 5, ThreatModel("linf", 0.01))(QueryOracle(Watched(), 60, chunk=6), x, zeros(60))
    assert max(sizes) == 6
    assert sum(sizes) == 50 + 10 * 6
    assert sizes.count(6) >= 12  # 100 questions, and 10 checks that come one by one


def test_selected_results_keep_their_trace() -> None:
    result = Climb([[0.1], [0.25]], WIDE, stop_at_hit=False)(Ramp(), torch.cat([grey(), grey(value=0.2)] * 2), zeros(4))
    some = result[torch.tensor([2, 1])]
    assert len(some) == 2
    assert some.trace[:, 0].tolist() == [0, 0]  # the hit, and the check of the last candidate
    assert some.success.tolist() == [True, False]


def test_no_images() -> None:
    for attack in (Climb([[0.1]], WIDE), Restarted(), PGD(steps=2), PGD(ThreatModel("l2", 1), decay=1.0), NAttack()):
        result = attack(Small(), images(0), zeros(0))
        assert len(result) == 0
        assert result.x_adv.shape == (0, 3, 8, 8)
        assert result.trace.shape == (0, 4)


# the model is left alone


class Moded(Small):
    """Notes the mode it is asked in; dropout and batch-norm stand in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(), nn.BatchNorm2d(3, dtype=torch.float64)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training or self.dropout.training or self.norm.training)
        return super().forward(self.norm(self.dropout(x)))


@pytest.mark.parametrize("attack", [PGD(steps=2), NAttack(steps=2, samples=4)], ids=["pgd", "nattack"])
def test_modes_parameters_and_gradients_are_left_alone(attack: IterativeAttack) -> None:
    model, x = Moded().train(), images(3)
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="Moded was in training mode"):
        attack(model, x, zeros(3))
    attack.perturb(model, x, zeros(3))
    assert not any(model.modes)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not x.requires_grad


def test_the_mode_is_restored_after_an_error() -> None:
    model = Moded().train()
    with pytest.raises(ValueError, match="y holds class 9"):
        PGD(steps=1)(model, images(1), zeros() + 9)
    assert model.training


def test_fast_is_asked_in_eval_mode_and_restored() -> None:
    fast = Moded().train()
    NAttack(steps=1, samples=4)(QueryOracle(Small(), 2, fast=fast), images(2), zeros(2))
    assert not any(fast.modes)
    assert fast.training


def test_images_labels_and_index_are_left_alone() -> None:
    x, y, index = images(3), decided(Small(), images(3)), torch.arange(3)
    copies = x.clone(), y.clone(), index.clone()
    result = PGD(ThreatModel("linf", 0.2), steps=3)(Small(), x, y, index=index)
    assert all(torch.equal(a, b) for a, b in zip((x, y, index), copies, strict=True))
    assert result.x_adv.data_ptr() != x.data_ptr()
    assert not result.x_adv.requires_grad


@pytest.mark.parametrize("attack", [PGD(steps=3), NAttack(steps=2, samples=4)], ids=["pgd", "nattack"])
def test_inference_mode(attack: IterativeAttack) -> None:
    x = images(3)
    y = decided(Small(), x)
    model = Small()
    plain = attack(model, x, y)
    with torch.inference_mode():
        inner = images(3)
        results = [attack(model, inner, y.clone(), index=torch.arange(3))]
        results.append(attack(QueryOracle(model, 3), inner, y.clone()))
        results.append(attack(QueryOracle(model, 3, budget=50), inner, y.clone()))
        attack.perturb(model, inner, y.clone())
        attack.perturb(model, inner, y.clone(), index=torch.arange(3))
    for result in results:
        torch.testing.assert_close(result.x_adv.clone(), plain.x_adv)


def test_no_grad_and_grad_mode_make_no_difference() -> None:
    x = images(3)
    y = decided(Small(), x)
    with torch.no_grad():
        quiet = PGD(steps=3)(Small(), x, y)
    leaf = x.clone().requires_grad_()
    assert torch.equal(PGD(steps=3)(Small(), leaf, y).x_adv, quiet.x_adv)
    assert leaf.grad is None


class Autocast(nn.Module):
    """Notes whether it runs under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 4)
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        answer = self.layer(x.flatten(1))
        self.seen.add(answer.dtype)
        return answer


@pytest.mark.parametrize("attack", [PGD(steps=2), NAttack(steps=2, samples=4)], ids=["pgd", "nattack"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_to_float16_is_left_and_to_bfloat16_kept(attack: IterativeAttack, dtype: torch.dtype) -> None:
    model, x = Autocast(), images(3, dtype=torch.float32)
    model.eval()
    with torch.autocast("cpu", dtype=dtype):
        result = attack(model, x, zeros(3))
        attack.perturb(model, x, zeros(3))
    assert model.seen == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}
    assert result.x_adv.dtype == torch.float32


# perturb


def test_perturb_takes_just_the_steps() -> None:
    x = images(4)
    y = decided(Small(), x)
    counter = Counting(Small(), x)
    threat = ThreatModel("linf", 0.3)
    out = PGD(threat, steps=3, step_size=0.02).perturb(counter, x, y, index=torch.arange(4))
    assert counter.seen.tolist() == [3] * 4
    full = PGD(threat, steps=3, step_size=0.02, stop_at_hit=False)
    search_free = full(Small(), x, y)
    lost = ~search_free.success
    if lost.any():
        torch.testing.assert_close(out[lost], search_free.x_adv[lost])
    assert threat.within(out, x).all()
    assert not out.requires_grad


def test_perturb_draws_afresh_unless_an_index_is_given() -> None:
    x = images(4)
    y, attack = zeros(4), PGD(steps=1)
    index = torch.tensor([7, 3, 9, 1])
    assert not torch.equal(attack.perturb(Small(), x, y), attack.perturb(Small(), x, y))
    assert torch.equal(attack.perturb(Small(), x, y, index=index), attack.perturb(Small(), x, y, index=index))
    alone = attack.perturb(Small(), x[1:2], y[1:2], index=index[1:2])
    torch.testing.assert_close(alone, attack.perturb(Small(), x, y, index=index)[1:2], rtol=0, atol=1e-12)


def test_perturb_gives_a_random_model_fresh_numbers() -> None:
    model, x, attack = Noisy(Small(), 4), images(4), PGD(steps=2, random_start=False)
    attack.perturb(model, x, zeros(4))
    attack.perturb(model, x, zeros(4))
    seen = torch.cat(model.seen)
    assert len(seen.unique()) == len(seen) == 16
    keyed = Noisy(Small(), 4)
    index = torch.tensor([7, 3, 9, 1])
    attack.perturb(keyed, x, zeros(4), index=index)
    attack.perturb(keyed, x[2:3], zeros(1), index=index[2:3])
    assert keyed.seen[0][2] == keyed.seen[2][0]


def test_perturb_of_no_images() -> None:
    assert PGD(steps=2).perturb(Small(), images(0), zeros(0)).shape == (0, 3, 8, 8)


# what is refused


@pytest.mark.parametrize(
    ("x", "error", "named"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "divide uint8 by 255"),
        ([[0.5]], TypeError, "floating-point tensor"),
        (torch.zeros(3, 4, 4), ValueError, r"\(B, C, H, W\)"),
        (torch.full((2, 1, 2, 2), math.nan), ValueError, "2 of 2 images hold NaN"),
        (torch.full((1, 1, 2, 2), math.inf), ValueError, "NaN or inf"),
        (torch.full((1, 1, 2, 2), 1.01), ValueError, r"must lie in \[0, 1\]"),
        (torch.full((1, 1, 2, 2), -0.5), ValueError, "normalisation inside the model"),
    ],
)
def test_images_that_are_none_are_refused(x: Tensor, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        check_images(x, ThreatModel())


@pytest.mark.parametrize(
    ("y", "target", "named"),
    [
        (torch.zeros(2, dtype=torch.int64), None, r"y must hold one class index per image, shape \(3,\)"),
        (torch.zeros(3), None, "y must hold"),
        (torch.zeros(3, dtype=torch.bool), None, "y must hold"),
        (torch.tensor([0, -1, 0]), None, "y holds the negative class -1"),
        (zeros(3), torch.ones(1, dtype=torch.int64), "target must hold"),
        (zeros(3), torch.tensor([1, 0, 1]), "target equals the label 0 of image 1"),
    ],
)
def test_labels_that_are_none_are_refused(y: Tensor, target: Tensor | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_labels(y, target, images(3))


@pytest.mark.parametrize(("y", "target", "named"), [(4, None, "y holds class 4"), (0, 7, "target holds class 7")])
def test_classes_that_the_model_does_not_know_are_named(y: int, target: int | None, named: str) -> None:
    goal = None if target is None else zeros() + target
    with pytest.raises(ValueError, match=named):
        PGD(steps=1)(Small(), images(1), zeros() + y, goal)


def test_small_integers_serve_as_labels() -> None:
    assert check_labels(torch.zeros(3, dtype=torch.uint8), None, images(3))[0].dtype == torch.int64


def test_too_little_access_is_refused_before_anything_is_asked() -> None:
    counter = Counting(Small(), images(2))
    for attack, granted in ((PGD(), Access.LOGITS), (NAttack(), Access.LABEL), (Restarted(), Access.LABEL)):
        with pytest.raises(AccessDenied, match=f"{type(attack).__name__} needs"):
            attack(QueryOracle(counter, 2, granted), images(2), zeros(2))
    assert counter.seen.tolist() == [0, 0]


def test_a_ledger_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="ledger of 3 rows, but there are 2 images"):
        PGD()(QueryOracle(Small(), 3), images(2), zeros(2))


def test_an_index_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="index"):
        PGD()(Small(), images(3), zeros(3), index=torch.arange(2))


def test_images_of_another_precision_than_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        PGD()(Small(), images(2, dtype=torch.float32), zeros(2))


# conveniences


def test_bound_attacks_map_images_and_labels_to_images() -> None:
    x = images(3)
    y, attack = decided(Small(), x), PGD(ThreatModel("linf", 0.2), steps=3)
    bound: Callable[[Tensor, Tensor], Tensor] = attack.bind(Small(), budget=2)
    assert torch.equal(bound(x, y), attack(QueryOracle(Small(), 3, budget=2), x, y).x_adv)


def test_another_threat_model_leaves_the_first_attack_alone() -> None:
    attack = PGD(ThreatModel("linf", 0.2), steps=3)
    other = attack.with_threat(ThreatModel("l2", 1.0))
    assert (other.threat.norm, attack.threat.norm) == ("l2", "linf")
    assert other.steps == 3


def test_an_image_already_misclassified_is_a_success_at_distance_zero() -> None:
    x = images(3)
    wrong = (decided(Small(), x) + 1) % 4
    result = PGD(steps=3, random_start=False)(Small(), x, wrong)
    assert result.success.all()
    assert result.distance.tolist() == [0, 0, 0]
    assert result.first_hit.tolist() == [1, 1, 1]
    assert torch.equal(result.x_adv, x)
