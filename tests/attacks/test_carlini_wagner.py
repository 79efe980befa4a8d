"""Carlini and Wagner's attack against a plain loop with torch's Adam, and closed forms on linear classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.nets import Counting, Linear, Noisy, Small, decided, images, near_boundary, safe
from torch import Tensor, nn

from lit_adv.attack import Search
from lit_adv.attacks import PGD, CarliniWagner
from lit_adv.attacks.carlini_wagner import CarliniWagnerState
from lit_adv.losses import margin, shortfall
from lit_adv.oracle import QueryOracle
from lit_adv.result import ZERO_GRADIENT
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
FAR = ThreatModel("l2", "inf")


class Watched(CarliniWagner):
    """Notes the constant, the image asked about and the iteration of every step."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seen: list[tuple[float, Tensor, int]] = []

    def _ask(self, search: Search, state: CarliniWagnerState) -> tuple[Tensor, Tensor, Tensor]:
        self.seen.append((float(state.c[0]), state.x[0].clone(), int(state.k[0])))
        return super()._ask(search, state)

    @property
    def constants(self) -> list[float]:
        return [c for c, _, k in self.seen if k == 0]


class Guarded(nn.Module):
    """A linear classifier and a last column that wins where a linear detector's margin is positive."""

    def __init__(self, inner: Linear, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.inner, self.weight, self.bias, self.reject = inner, weight, bias, len(inner.weight)

    def suspicion(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight + self.bias

    def forward(self, x: Tensor) -> Tensor:
        scores = self.inner(x)
        return torch.cat([scores, (scores.amax(1) + self.suspicion(x)).unsqueeze(1)], 1)


def plain(
    model: nn.Module, x0: Tensor, y: int, c: float, constants: int, iterations: int, rate: float, abort: bool
) -> list[tuple[float, Tensor, int]]:
    """The attack on one image (C, H, W) as the authors' loop has it: constant, image and iteration of each step."""
    lower, upper = 0.0, 1e10
    start = ((2 * x0 - 1) * (1 - 1e-6)).atanh()
    centre = (start.tanh() + 1) / 2
    seen = []
    for number in range(constants):
        if constants >= 10 and number == constants - 1 and upper < 1e10:
            c = upper
        w = torch.zeros_like(x0, requires_grad=True)
        adam = torch.optim.Adam([w], lr=rate)
        previous, found = float("inf"), False
        for k in range(iterations):
            image = ((start + w).tanh() + 1) / 2
            seen.append((c, image.detach(), k))
            logits = model(image.unsqueeze(0))[0]
            others = torch.cat([logits[:y], logits[y + 1 :]]).max()
            loss = ((image - centre) ** 2).sum() + c * (logits[y] - others).clamp_min(0)
            found |= bool(others > logits[y])
            adam.zero_grad()
            loss.backward()
            adam.step()
            if abort and k % max(1, iterations // 10) == 0:
                if loss.item() > 0.9999 * previous:
                    break
                previous = loss.item()
        if found:
            upper = min(upper, c)
        else:
            lower = max(lower, c)
        c = (lower + upper) / 2 if upper < 1e10 else 10 * c
    return seen


@pytest.mark.parametrize(("constants", "iterations", "abort"), [(3, 20, False), (4, 40, True), (10, 12, False)])
def test_it_is_the_authors_loop_on_one_image(constants: int, iterations: int, abort: bool) -> None:
    model, x = Small(scale=4.0), images(1, 7)
    y = decided(model, x)
    settings = {"iterations": iterations, "search_steps": constants, "step_size": 0.02, "constant": 0.004}
    attack = Watched(FAR, **settings, abort_early=abort)
    result = attack(model, x, y)
    expected = plain(model, x[0], int(y), 0.004, constants, iterations, 0.02, abort)
    assert [k for _, _, k in attack.seen] == [k for _, _, k in expected]
    assert [c for c, _, _ in attack.seen] == pytest.approx([c for c, _, _ in expected])
    assert len(attack.constants) == constants
    for (_, found, _), (_, image, _) in zip(attack.seen, expected, strict=True):
        torch.testing.assert_close(found, image, rtol=0, atol=2e-6)
    with torch.no_grad():
        won = [float((image - x[0]).norm()) for _, image, _ in expected if int(model(image[None]).argmax()) != int(y)]
    assert result.success.all()
    assert float(result.distance) == pytest.approx(min(won), rel=1e-5)
    assert result.queries.tolist() == [len(expected)]
    assert result.checks.tolist() == [0]


def test_the_bracket() -> None:
    """Constants grow tenfold to the first success, are bisected, and the tenth of ten is the least that succeeded."""
    model, x = Small(scale=4.0), images(1, 7)
    attack = Watched(FAR, 20, 10, 0.02, 0.004)
    attack(model, x, decided(model, x))
    won: dict[float, bool] = {}
    for c, image, _ in attack.seen:
        wrong = int(model(image[None]).argmax()) != int(decided(model, x))
        won[c] = won.get(c, False) or wrong
    tried = attack.constants
    first = next(number for number, c in enumerate(tried) if won[c])
    assert tried[: first + 1] == pytest.approx([0.004 * 10**number for number in range(first + 1)])
    lower, upper = tried[first - 1] if first else 0.0, tried[first]
    for c in tried[first + 1 : 9]:
        assert c == pytest.approx((lower + upper) / 2)
        lower, upper = (lower, c) if won[c] else (c, upper)
    assert tried[9] == pytest.approx(upper)


@pytest.mark.parametrize("box", [(0.0, 1.0), (-1.0, 2.0)])
def test_the_nearest_image_of_a_linear_classifier(box: tuple[float, float]) -> None:
    model, x, y, distance = near_boundary(5, "l2")
    for dtype in (torch.float64, torch.float32):
        attack = CarliniWagner(ThreatModel("l2", "inf", box), 100, 4, constant=0.01)
        result = attack(model.to(dtype), x.to(dtype), y)
        assert result.success.all()
        assert (result.distance >= distance * (1 - 1e-5)).all()
        assert float(result.distance.median()) < 1.02 * distance
        torch.testing.assert_close(result.distance, (result.x_adv - x.to(dtype)).flatten(1).norm(dim=1))


def test_a_finite_radius() -> None:
    model, x, y, distance = near_boundary(5, "l2")
    wide = CarliniWagner(ThreatModel("l2", 1.25 * distance), 100, 3, constant=0.02)
    result = wide(model, x, y)
    assert result.success.all()
    assert torch.equal(result.first_hit, result.queries)  # it ends at the first
    wide.stop_at_hit = False
    assert float(wide(model, x, y).distance.median()) < float(result.distance.median())
    narrow = CarliniWagner(ThreatModel("l2", 0.95 * distance), 100, 3, constant=0.02)(model, x, y)
    assert not narrow.success.any()
    assert (narrow.distance < 1.05 * distance).all()  # the nearest is kept, though it lies outside


@pytest.mark.parametrize("kappa", [2.0, 5.0])
def test_confidence(kappa: float) -> None:
    """The margin of a linear classifier is -4 + |w| d along the shortest way."""
    model, x, y, distance = near_boundary(5, "l2")
    result = CarliniWagner(FAR, 100, 4, constant=0.02, kappa=kappa)(model, x, y)
    assert result.success.all()
    reached = margin(model(result.x_adv), y)
    assert (reached >= kappa * (1 - 1e-9)).all()
    expected = distance * (4 + kappa) / 4
    assert (result.distance >= expected * (1 - 1e-9)).all()
    assert float(result.distance.median()) < 1.02 * expected


def test_what_falls_short_of_the_confidence_is_no_hit_of_any_attack() -> None:
    model, x, y, distance = near_boundary(4, "l2")
    pgd = PGD(ThreatModel("l2", 2 * distance), 10, distance / 2, random_start=False, loss=margin)  # margin -4 + 2 t
    bare = pgd(model, x, y)
    pgd.confidence = 3.0
    sure = pgd(model, x, y)
    assert sure.success.all()
    assert (sure.first_hit > bare.first_hit).all()
    assert (margin(model(sure.x_adv), y) >= 3).all()
    pgd.confidence = 4.5
    assert not pgd(model, x, y).success.any()


def test_targets() -> None:
    """Where the third class is out of the way, the nearest image of the target lies on one plane."""
    model, x = Linear(3), 0.4 + 0.2 * images(20, 3)
    with torch.no_grad():
        model.bias -= model(x).mean(0) - torch.tensor([7.0, 0.0, 0.0])
        scores = model(x)
    y = scores.argmax(1)
    for target in (1, 2):
        normal = model.weight[target] - model.weight[y]
        gap = scores.gather(1, y[:, None])[:, 0] - scores[:, target]
        nearest = x + (gap / (normal**2).sum(1) * 1.0001)[:, None, None, None] * normal.view_as(x)
        alone = (
            (model(nearest).argmax(1) == target) & (y != target) & (nearest == nearest.clamp(0, 1)).flatten(1).all(1)
        )
        few = alone.nonzero().squeeze(1)[:2]
        assert len(few) == 2
        aim = torch.full((2,), target)
        result = CarliniWagner(FAR, 100, 5, constant=0.005)(model, x[few], y[few], aim)
        assert torch.equal(decided(model, result.x_adv), aim)
        expected = (gap / normal.norm(dim=1))[few].detach()
        assert (result.distance >= expected * (1 - 1e-9)).all()
        assert (result.distance < 1.02 * expected).all()


def guarded(count: int = 4) -> tuple[Guarded, Tensor, Tensor, float]:
    """A guarded linear classifier, images it gets right, and how far they are from being wrong and unsuspected.

    The nearest such image solves a least-squares problem with two active planes: d = A' (A A')^-1 b.
    """
    inner, x, y, _ = near_boundary(count, "l2")
    w = (inner.weight[1] - inner.weight[0]).detach()
    other = images(1, 31).flatten() - 0.5
    v = 0.5 * w + 3.0 * other * w.norm() / other.norm()  # going for the other class alone raises suspicion
    flat = x.flatten(1)
    across = v - (v @ w) / (w @ w) * w
    flat = flat - ((flat @ v - (flat @ v).mean()) / (across @ across))[:, None] * across
    model = Guarded(inner, v, float(-1.0 - (flat @ v).mean()))
    planes = torch.stack([w, -v])
    solved = torch.linalg.solve(planes @ planes.T, torch.tensor([4.0, -1.0], dtype=torch.float64))
    assert (solved > 0).all()
    return model, flat.view_as(x), y, float((planes.T @ solved).norm())


@pytest.mark.parametrize("beta", [None, 0.5, 2.0])
def test_a_detector_is_evaded_too(beta: float | None) -> None:
    model, x, y, distance = guarded()
    assert (model.suspicion(x) < 0).all()
    result = CarliniWagner(FAR, 200, 4, constant=0.02, beta=beta)(model, x, y)
    assert result.success.all()
    assert (decided(model.inner, result.x_adv) != y).all()
    assert (model.suspicion(result.x_adv) < 0).all()
    assert (result.distance >= distance * (1 - 1e-9)).all()
    assert float(result.distance.median()) < 1.03 * distance
    bare = CarliniWagner(FAR, 100, 2, constant=0.02)(model.inner, x, y)
    assert (model.suspicion(bare.x_adv) > 0).all()  # of which the attack on the classifier alone takes no heed


def test_a_refusal_is_no_success_and_a_target_beats_it() -> None:
    model, x, y, _ = guarded()
    model.bias = 1e3
    result = CarliniWagner(FAR, 20, 3)(model, x, y)
    assert not result.success.any()
    assert (result.distance == torch.inf).all()
    model, x, y, distance = guarded()
    result = CarliniWagner(FAR, 200, 4, constant=0.02)(model, x, y, 1 - y)
    assert (model(result.x_adv).argmax(1) == 1 - y).all()
    assert float(result.distance.median()) < 1.03 * distance


def test_the_shortfall() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0, 5.0], [1.0, 3.0, 0.0, 2.0], [1.0, 3.0, 0.0, 4.0]])
    y = torch.zeros(3, dtype=torch.int64)
    assert shortfall(scores, y, reject=3).tolist() == [4.0, 0.0, 1.0]
    assert shortfall(scores, y, reject=3, kappa=0.5).tolist() == [4.5, 0.0, 1.5]
    # classes alone: 2, -2, -2; the detector's margin: 2, -1, 1
    assert shortfall(scores, y, None, 3, 0.5, 10.0).tolist() == [2.5 + 25, 0.0, 15.0]
    assert shortfall(scores, y, y + 1, 3, 0.0, 10.0).tolist() == [2 + 20, 0.0, 10.0]
    bare = scores[:, :3]
    assert shortfall(bare, y, None, None, 0.0, 10.0).tolist() == shortfall(bare, y).tolist() == [2.0, 0.0, 0.0]


def test_where_no_constant_succeeds() -> None:
    inner, x, y = safe()
    model = Counting(inner, x)
    attack = Watched(FAR, 10, 4, abort_early=False)
    result = attack(model, x, y)
    assert not result.success.any()
    assert result.x_adv.isfinite().all()
    assert result.counts["no constant c succeeded"] == (3, 3)
    assert attack.constants == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])
    assert result.queries.tolist() == model.seen.tolist() == [40] * 3
    assert result.checks.tolist() == [0] * 3
    assert result.iterations.tolist() == [40] * 3
    early = CarliniWagner(FAR, 100, 4)(inner, x, y)
    assert (early.queries < 400).all()


def test_giving_up_early_costs_little() -> None:
    model, x = Small(scale=4.0), images(6, 7)
    y = decided(model, x)
    early, late = (CarliniWagner(FAR, 100, 4, constant=0.02, abort_early=abort)(model, x, y) for abort in (True, False))
    assert early.success.all()
    assert late.success.all()
    assert (early.distance < 1.02 * late.distance).all()
    assert int(early.queries.sum()) < 0.9 * int(late.queries.sum())
    assert late.counts[ZERO_GRADIENT] == (0, 2400)  # a hinge at 0 is no fault of the model


def test_training_gets_the_nearest_of_its_own_images() -> None:
    model, x = Small(scale=4.0), images(6, 7)
    y = decided(model, x)
    attack = CarliniWagner(FAR, 40, 3, 0.02, constant=0.01, abort_early=False)
    found = attack.perturb(model, x, y)
    torch.testing.assert_close(found, attack(model, x, y).x_adv, rtol=0, atol=1e-6)
    small = attack.with_threat(ThreatModel("l2", 0.1))
    assert small.threat.within(small.perturb(model, x, y), x).all()


def test_what_is_wrong_from_the_start_ends_there() -> None:
    model, x = Small(), images(4, 7)
    result = CarliniWagner(FAR, 20, 2)(model, x, (decided(model, x) + 1) % 4)
    assert torch.equal(result.x_adv, x)
    assert result.distance.tolist() == [0] * 4
    assert result.queries.tolist() == [1] * 4


def test_slopes_that_are_not_finite_stay_out_of_the_way() -> None:
    """The root of a black pixel has an infinite slope, and times 0 none at all."""

    class Rooted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            return 20 * torch.stack([0.6 + 0 * flat[:, 0].sqrt(), flat[:, 1:].mean(1)], 1)

    x = images(3, 5)
    x[:, 0, 0, 0] = 0
    y = torch.zeros(3, dtype=torch.int64)
    attack = CarliniWagner(FAR, 50, 3, 0.05, 0.5)
    with pytest.warns(UserWarning, match="not finite"):
        result = attack(Rooted(), x, y)
    assert result.success.all()
    assert result.x_adv.isfinite().all()


def test_a_model_without_slopes_is_named_and_left_unbroken() -> None:
    class Stairs(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((4 * x).round() / 4)

    inner, x, _, _ = near_boundary(3, "l2")
    x[0] = 0
    model = Stairs(inner)
    with pytest.warns(UserWarning, match="exactly 0"):
        result = CarliniWagner(FAR, 20, 3)(model, x, decided(model, x))
    assert not result.success.any()
    torch.testing.assert_close(result.x_adv, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eot", [None, 5])
def test_a_random_model(eot: int | None) -> None:
    inner, x, y, distance = near_boundary(3, "l2")
    attack = CarliniWagner(FAR, 40, 2, 0.02, 0.1, abort_early=False, eot=eot)
    result = attack(Noisy(inner, 3, 0.01), x, y)
    assert result.success.all()
    assert (result.queries - result.checks).tolist() == [80 * (eot or 20)] * 3
    assert (result.distance < 1.3 * distance).all()
    oracle = QueryOracle(Noisy(inner, 3, 0.01), 3, budget=100)
    assert int(attack(oracle, x, y).queries.max()) <= 100


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"threat": ThreatModel("linf", 0.1)}, "l2"),
        ({"threat": 0.3}, "ThreatModel"),
        ({"iterations": 0}, "iterations"),
        ({"search_steps": 1.5}, "search_steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"constant": float("inf")}, "constant"),
        ({"kappa": -1.0}, "kappa"),
        ({"beta": float("nan")}, "beta"),
        ({"eot": 0}, "eot"),
    ],
)
def test_bad_arguments(named: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        CarliniWagner(**named)
