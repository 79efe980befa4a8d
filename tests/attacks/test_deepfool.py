"""DeepFool against closed forms and against its algorithm as a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.nets import Counting, Noisy, Small, decided, images, near_boundary, safe
from torch import Tensor, nn

from lit_adv.attacks import DeepFool
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.oracle import QueryOracle
from lit_adv.threat import Norm, ThreatModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was in training mode"),
    pytest.mark.filterwarnings("ignore:.*the gradient was exactly 0 or not finite"),
]
ANY = {norm: ThreatModel(norm, "inf") for norm in ("linf", "l2")}


class Guarded(nn.Module):
    """A classifier and a refusal that speaks for ``height`` more than the first class."""

    def __init__(self, model: nn.Module, height: float) -> None:
        super().__init__()
        self.model, self.height = model, height
        self.reject = 3

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model(x)
        return torch.cat([scores, scores[:, :1] + self.height], 1)


def reference(
    model: nn.Module, x0: Tensor, y: int, norm: str, steps: int, target: int | None = None, overshoot: float = 0.02
) -> tuple[Tensor, int]:
    """One image by the algorithm's text: the last image, and after how many steps."""
    x, r = x0.clone(), torch.zeros_like(x0)
    for step in range(steps):
        leaf = x[None].clone().requires_grad_()
        scores = model(leaf)[0]
        if int(scores.argmax()) == target or (target is None and int(scores.argmax()) != y):
            return x, step
        pairs = [(k, y) for k in range(len(scores)) if k != y]
        if target is not None:
            others = scores.detach().clone()
            others[target] = -math.inf
            pairs = [(target, int(others.argmax()))]
        best = math.inf
        for theirs, ours in pairs:
            difference = scores[theirs] - scores[ours]
            (w,) = torch.autograd.grad(difference, leaf, retain_graph=True)
            dual = w.abs().sum() if norm == "linf" else w.norm()
            far = float(difference.detach().abs() / dual)
            if far < best:
                best = far
                if norm == "linf":
                    move = (far + 1e-4 / math.sqrt(x.numel())) * w[0].sign()
                else:
                    move = (far + 1e-4) * w[0] / dual
        r = r + move
        x = (x0 + (1 + overshoot) * r).clamp(0, 1)
    return x, steps


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("targeted", [False, True])
def test_steps_are_those_of_the_algorithm(norm: Norm, steps: int, targeted: bool) -> None:
    model, x = Small(classes=6, scale=4.0), images(8)
    x = (2 * x - 0.5).clamp(0, 1)  # many pixels at the ends of the box
    y = decided(model, x)
    target = (y + 2) % 6 if targeted else None
    attack = DeepFool(ANY[norm], steps)
    last = attack.perturb(model, x, y, target)
    result = attack(QueryOracle(model, 8, known_right=True), x, y, target)
    for row in range(8):
        goal = None if target is None else int(target[row])
        expected, taken = reference(model, x[row], int(y[row]), norm, steps, goal)
        torch.testing.assert_close(last[row], expected, rtol=0, atol=1e-9)
        if result.success[row]:
            torch.testing.assert_close(result.x_adv[row], expected, rtol=0, atol=1e-9)
        if taken < steps:
            assert result.success[row]
            assert int(result.iterations[row]) == taken
            assert int(result.queries[row]) == taken + 2  # the clean image for its scores, and once more for gradients
            assert int(result.checks[row]) == 1
    if steps == 50:
        assert result.success.all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_boundary_is_met_at_its_distance(norm: Norm) -> None:
    model, x, y, least = near_boundary(6, norm)
    result = DeepFool(ANY[norm])(model, x, y)
    assert result.success.all()
    assert (result.distance >= least).all()
    assert (result.distance <= 1.02 * (least + 1.1e-4)).all()
    assert (result.iterations == 1).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("share", [0.95, 1.25])
def test_a_radius_decides(norm: Norm, share: float) -> None:
    model, x, y, least = near_boundary(6, norm)
    result = DeepFool(ThreatModel(norm, share * least))(model, x, y)
    assert result.success.all() == result.success.any() == (share > 1)
    assert (result.distance <= 1.03 * least).all()  # told at any radius


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_detector_must_be_passed_too(norm: Norm) -> None:
    model, x, y, least = near_boundary(6, norm)
    guarded = Guarded(model, 2.0)  # the first class's score less the second's is 4 at the images
    result = DeepFool(ANY[norm])(guarded, x, y)
    assert result.success.all()
    assert (guarded(result.x_adv).argmax(1) == 1).all()
    assert (result.distance >= 1.5 * least).all()
    assert (result.distance <= 1.02 * (1.5 * least + 1.1e-4)).all()


def test_overshoot_stretches_the_step() -> None:
    model, x, y, least = near_boundary(3, "l2")
    result = DeepFool(ANY["l2"], overshoot=0.5)(model, x, y)
    torch.testing.assert_close(result.distance, torch.full_like(result.distance, 1.5 * (least + 1e-4)))


def test_few_classes_suffice_where_the_runner_up_is_nearest() -> None:
    model, x, y, _ = near_boundary(3, "l2")
    few, all_of_them = (DeepFool(ANY["l2"], classes=classes)(model, x, y) for classes in (2, 10))
    torch.testing.assert_close(few.distance, all_of_them.distance)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_cannot_be_fooled_stays_unbroken(norm: Norm) -> None:
    model, x, y = safe()
    result = DeepFool(ANY[norm])(model, x, y)
    assert not result.success.any()
    assert result.x_adv.isfinite().all()
    assert (result.distance == torch.inf).all()


def test_a_row_that_cannot_move_ends() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :3] + torch.tensor([2.0, 1, 0], dtype=x.dtype)

    x = images(4)
    result = DeepFool()(Flat(), x, torch.zeros(4, dtype=torch.int64))
    assert result.queries.tolist() == [2] * 4
    assert torch.equal(result.x_adv, x)


def test_a_tie_is_left() -> None:
    class Tie(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gap = x.flatten(1).sum(1) - x.detach().flatten(1).shape[1] / 2
            return torch.stack([-gap, gap], 1)

    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    for norm, threat in ANY.items():
        result = DeepFool(threat)(Tie(), x, torch.zeros(1, dtype=torch.int64))
        assert result.success.all(), norm
        assert float(result.distance) < 2e-4


def test_wrong_images_cost_one_query() -> None:
    model = Counting(Small(), images(3))
    y = (decided(Small(), images(3)) + 1) % 4
    result = DeepFool()(model, images(3), y)
    assert result.success.all()
    assert not result.distance.any()
    assert result.queries.tolist() == [1] * 3 == model.seen.tolist()


def test_a_random_model_is_averaged_and_hits_are_confirmed() -> None:
    model = Noisy(Small(scale=4.0), 4, 0.05).eval()
    x = images(5)
    y = decided(model.model, x)
    result = DeepFool(ANY["l2"])(QueryOracle(model, 5, known_right=True), x, y)
    assert result.success.all()
    assert ((result.queries - result.checks) % 20 == 0).all()
    alone = DeepFool(ANY["l2"])(Small(scale=4.0), x, y)
    assert (result.distance < 1.5 * alone.distance + 0.1).all()


def test_training_gets_images_within_the_ball() -> None:
    model, x = Small(scale=4.0), images(6)
    threat = ThreatModel("l2", 0.05)
    out = DeepFool(threat).perturb(model, x, decided(model, x))
    assert threat.within(out, x).all()


def test_a_stand_in_that_errs_does_not_end_the_search() -> None:
    class Shifted(Defense):
        """Its surrogate crosses the boundary sooner than what is deployed."""

        num_classes = 2

        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

        def forward(self, x: Tensor, **draws: Draws) -> Tensor:
            gap = x.flatten(1).mean(1) - self.at
            return torch.stack([-gap, gap], 1)

        def surrogate(self, x: Tensor, **draws: Draws) -> Tensor:
            return self(x + 0.02)

    x = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    model = Shifted()
    oracle = QueryOracle(model, 2, surrogate="surrogate")
    result = DeepFool(ANY["linf"])(oracle, x, torch.zeros(2, dtype=torch.int64))
    assert result.success.all()
    assert (result.distance >= 0.1).all()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"threat": ThreatModel("l1", 3.0)}, "rules for linf and l2, got norm 'l1'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"classes": 1}, "classes must be a whole number of at least 2, got 1"),
        ({"eot": 0}, "eot must be a whole number of at least 1, got 0"),
        ({"overshoot": -0.1}, "overshoot must be a finite number >= 0 .* got -0.1"),
    ],
)
def test_arguments_out_of_range_are_named(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DeepFool(**settings)  # type: ignore[arg-type]
