"""The loop of all iterated attacks: pools, callers, modes, training, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from contracts.climb import WIDE, Climb, Ramp, Restarted, grey, zeros
from contracts.nets import Counting, Noisy, Small, decided, images
from torch import Tensor, nn

from lit_adv.attack import Attack, AttackResult, IterativeAttack, check_images, check_labels
from lit_adv.attacks import APGD, DDN, FAB, PGD, CarliniWagner, Cascade, DeepFool, NAttack
from lit_adv.oracle import Access, AccessDenied, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")


# rows, pools and callers


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


def test_results_can_be_selected_by_a_mask() -> None:
    result = Climb([[0.1], [0.25]], WIDE)(Ramp(), torch.cat([grey(), grey(value=0.2)] * 2), zeros(4))
    won = result[result.success]
    assert len(won) == 2
    assert won.success.all()
    assert won.trace[:, 0].tolist() == [0, 1]


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


IN_VALIDATION: dict[str, Attack] = {
    "pgd": PGD(steps=3),
    "nattack": NAttack(steps=2, samples=4),
    "apgd": APGD(steps=3),
    "carlini_wagner": CarliniWagner(iterations=4, search_steps=2),
    "ddn": DDN(steps=3),
    "deepfool": DeepFool(steps=3),
    "fab": FAB(steps=3),
    "cascade": Cascade(ThreatModel(), {"pgd": PGD(steps=2), "nattack": NAttack(steps=2, samples=4)}),
}


@pytest.mark.parametrize("attack", IN_VALIDATION.values(), ids=list(IN_VALIDATION))
def test_inference_mode(attack: Attack) -> None:
    x = images(3)
    y = decided(Small(), x)
    model = Small()
    plain = attack(model, x, y)
    with torch.inference_mode():
        inner = images(3)
        results = [attack(model, inner, y.clone(), index=torch.arange(3))]
        results.append(attack(QueryOracle(model, 3), inner, y.clone()))
        results.append(attack(QueryOracle(model, 3, budget=50), inner, y.clone()))
        if isinstance(attack, IterativeAttack):
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
