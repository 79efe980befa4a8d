"""Auto-PGD against algorithm 1 written out for one image, and against the linear classifier's closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from contracts.nets import Linear, Noisy, Recording, Small, decided, images, near_boundary
from torch import Tensor, nn

from lit_adv.attack import Search, State
from lit_adv.attacks import APGD, PGD
from lit_adv.attacks.apgd import APGDState, checkpoints
from lit_adv.defense import Defense
from lit_adv.losses import Combined, Loss, cross_entropy, dlr, margin
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was in training mode"),
    pytest.mark.filterwarnings("ignore:.*the gradient was exactly 0 or not finite"),
]
NONE_BROKEN = ThreatModel("linf", 1e-4)


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(30) == [0, 7, 13, 18, 21, 24, 27, 28, 30]  # 6.6, 12.3, 17.1, 21, 24, 26.1, 27.9, 29.7
    assert checkpoints(1) == [0, 1]


# algorithm 1 for one image


def projection(norm: str, eps: float, x0: Tensor) -> Callable[[Tensor], Tensor]:
    def into(x: Tensor) -> Tensor:
        if norm == "linf":
            return torch.min(torch.max(x, x0 - eps), x0 + eps).clamp(0, 1)
        delta = x - x0
        return (x0 + delta * min(1.0, eps / max(float(delta.norm()), 1e-30))).clamp(0, 1)

    return into


def algorithm_1(
    model: nn.Module, x0: Tensor, y: int, norm: str, eps: float, steps: int, marks: list[int], rho: float, alpha: float
) -> tuple[list[Tensor], list[float], int]:
    """All points asked about in turn, the best loss after each, and how often the search really went back."""
    into = projection(norm, eps, x0)

    def f(x: Tensor) -> tuple[float, Tensor]:
        leaf = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf[None]), torch.tensor([y]))
        (gradient,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), gradient.sign() if norm == "linf" else gradient / gradient.norm()

    eta, backs = 2 * eps, 0
    x = [x0, into(x0 + eta * f(x0)[1])]
    asked, values = list(x), [f(point)[0] for point in x]
    top = max(range(2), key=lambda i: values[i])
    best_x, best = x[top], values[top]
    bests, etas, best_at = [values[0], best], {0: eta}, {0: best}
    for k in range(1, steps):
        z = into(x[k] + eta * f(x[k])[1])
        x.append(into(x[k] + alpha * (z - x[k]) + (1 - alpha) * (x[k] - x[k - 1])))
        asked.append(x[k + 1])
        values.append(f(x[k + 1])[0])
        if values[k + 1] > best:
            best_x, best = x[k + 1], values[k + 1]
        bests.append(best)
        if k in marks:
            last = marks[marks.index(k) - 1]
            etas[k], best_at[k] = eta, best
            rises = sum(values[i + 1] > values[i] for i in range(last, k))
            # "the step size was not reduced at the last checkpoint", of which the first is none
            same = last > 0 and etas[last] == eta and best_at[last] == best
            if rises < rho * (k - last) or same:
                backs += not torch.equal(x[k + 1], best_x)
                eta /= 2
                etas[k] = math.nan  # reduced here
                x[k + 1], values[k + 1] = best_x, best
    return asked, bests, backs


def asked_by(attack: APGD, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The points that a whole run asks about, (steps + 1, n, C, H, W)."""
    recording = Recording(model)
    attack(QueryOracle(recording, len(x), known_right=True, chunk=len(x)), x, y)
    return torch.stack(recording.given)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("linf", 0.4), ("l2", 1.0), ("l2", 4.0)])
@pytest.mark.parametrize(("rho", "alpha"), [(0.75, 0.75), (0.3, 0.5)])
def test_steps_are_those_of_algorithm_1(norm: str, eps: float, rho: float, alpha: float) -> None:
    model, x = Small(scale=6.0), images(5)
    y = decided(model, x)
    threat = ThreatModel(norm, eps)  # type: ignore[arg-type]
    attack = APGD(threat, 30, rho=rho, alpha=alpha, random_start=False, stop_at_hit=False)
    ours = asked_by(attack, model, x, y)
    assert len(ours) == 31  # and each of them cost one forward
    backs = 0
    for row in range(5):
        marks = [0, 7, 13, 18, 21, 24, 27, 28, 30]
        theirs, _, went_back = algorithm_1(model, x[row], int(y[row]), norm, eps, 30, marks, rho, alpha)
        torch.testing.assert_close(ours[:, row], torch.stack(theirs), rtol=0, atol=1e-6)
        backs += went_back
    assert backs >= 5


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y, reduction="none")


class Watched(APGD):
    """Keeps a copy of the state after each step."""

    def step(self, search: Search, state: State) -> State:
        after = super().step(search, state)
        assert isinstance(after, APGDState)
        seen.append((after.best.clone(), after.rate.clone(), after.aim))
        return after


seen: list[tuple[Tensor, Tensor, Tensor | None]] = []


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_best_loss_never_falls_and_steps_never_grow(norm: str) -> None:
    model, x = Small(scale=6.0), images(6)
    y = decided(model, x)
    seen.clear()
    attack = Watched(ThreatModel(norm, {"linf": 0.3, "l2": 2.0, "l1": 20.0}[norm]), 40, stop_at_hit=False)  # type: ignore[arg-type]
    points = asked_by(attack, model, x, y)
    losses = torch.stack([losses_of(model, each, y) for each in points])
    best = torch.stack([each[0] for each in seen])
    torch.testing.assert_close(best, losses[:40].cummax(0).values)
    rates = torch.stack([each[1] for each in seen])
    assert (rates[0] == 2 * attack.threat.radius).all()
    assert ((rates[1:] == rates[:-1]) | (rates[1:] == rates[:-1] / 2)).all()
    assert (rates[-1] < rates[0]).all()


def test_training_is_given_the_best_point() -> None:
    model, x = Small(scale=6.0), images(6)
    y = decided(model, x)
    attack = APGD(ThreatModel("linf", 0.3), 20)
    best = losses_of(model, attack.perturb(model, x, y, index=torch.arange(6)), y)
    attack.stop_at_hit = False
    points = asked_by(attack, model, x, y)
    losses = torch.stack([losses_of(model, each, y) for each in points[:20]])
    torch.testing.assert_close(best, losses.amax(0))


# what it can break


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("settings", [{}, {"loss": margin}, {"loss": dlr}, {"loss": dlr, "targets": 3}, {"alpha": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_yardstick(norm: str, settings: dict[str, object], dtype: torch.dtype) -> None:
    model, x, y, distance = near_boundary(8, norm, classes=4)
    model, x = model.to(dtype), x.to(dtype)
    for factor, wins in ((1.25, True), (0.95, False)):
        threat = ThreatModel(norm, factor * distance)  # type: ignore[arg-type]
        result = APGD(threat, 20, **settings)(model, x, y)  # type: ignore[arg-type]
        assert result.success.tolist() == [wins] * 8
        if wins:
            assert (result.distance <= threat.radius * (1 + 1e-5)).all()
            assert (result.distance >= 0.999 * distance).all()
            assert (decided(model, result.x_adv) != y).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("linf", 0.02), ("l2", 0.1), ("l2", 0.2)])
def test_it_breaks_what_pgd_breaks(norm: str, eps: float) -> None:
    model, x = Small(scale=8.0), images(150)
    y = decided(model, x)
    threat = ThreatModel(norm, eps)  # type: ignore[arg-type]
    theirs = PGD(threat, 10)(model, x, y).success
    ours = APGD(threat, 10)(model, x, y).success
    assert 50 <= int(theirs.sum()) <= 120
    assert ours[theirs].all()
    assert ours.sum() > theirs.sum()


def test_targeted_attacks_reach_their_target() -> None:
    model, x = Small(), images(8)
    y = decided(model, x)
    for loss in (cross_entropy, dlr, margin):
        target = (y + 2) % 4
        result = APGD(ThreatModel("linf", 0.5), 40, loss=loss)(model, x, y, target)
        assert result.success.double().mean() > 0.7
        assert torch.equal(decided(model, result.x_adv)[result.success], target[result.success])


# aims


def ranking(model: nn.Module, image: Tensor, y: int) -> list[int]:
    """Wrong classes of the clean image, likeliest first."""
    with torch.no_grad():
        logits = model(image[None])[0].tolist()
    return sorted((label for label in range(4) if label != y), key=lambda label: -logits[label])


@pytest.mark.parametrize("targets", [1, 2, 3, 5])
@pytest.mark.parametrize("restarts", [1, 2])
def test_aims_are_the_likeliest_wrong_classes(targets: int, restarts: int) -> None:
    model, x = Small(), images(4)
    y = decided(model, x)
    expected = min(targets, 3)
    for row in range(4):
        seen.clear()
        attack = Watched(NONE_BROKEN, 3, restarts, dlr, targets)
        oracle = QueryOracle(model, 1, known_right=True)
        result = attack(oracle, x[row : row + 1], y[row : row + 1])
        aims = [int(each[2]) for each in seen if each[2] is not None]
        order = ranking(model, x[row], int(y[row]))[:expected]
        assert aims == [label for _ in range(restarts) for label in order for _ in range(3)]
        starts = restarts * expected
        assert int(result.queries) == 1 + starts * (3 + 1)  # the clean image, then steps and a check of each start
        assert int(result.checks) == 1 + starts
        assert (attack.restarts, attack.targets) == (restarts, targets)  # as a report reads them


class Slope(nn.Module):
    """Up the one direction class 1 rises slowly and class 2, last at first, soon overtakes all."""

    def forward(self, x: Tensor) -> Tensor:
        s = x.flatten(1).mean(1)
        return torch.stack([0 * s, 0.5 * s - 1, 3 * s - 2, 0 * s - 9], 1)


def test_any_wrong_class_is_a_success_wherever_it_aims() -> None:
    x, y = 0.1 + 0.0 * images(3), torch.zeros(3, dtype=torch.int64)
    result = APGD(ThreatModel("linf", 0.8), 5, loss=margin, targets=1, random_start=False)(Slope(), x, y)
    assert decided(Slope(), result.x_adv).tolist() == [2] * 3
    assert result.success.all()


def test_a_target_of_the_caller_is_all_that_is_aimed_at() -> None:
    model, x = Small(), images(6)
    y = decided(model, x)
    target = (y + 1) % 4
    for eps in (1e-4, 0.2):
        threat = ThreatModel("linf", eps)
        plain = APGD(threat, 10, 2, dlr)(model, x, y, target)
        aimed = APGD(threat, 10, 2, dlr, targets=3)(model, x, y, target)
        assert torch.equal(plain.success, aimed.success)
        assert torch.equal(plain.queries, aimed.queries)
        assert torch.equal(plain.x_adv[plain.success], aimed.x_adv[plain.success])


class Detector(Defense):
    """Refuses bright images, in column 4."""

    num_classes, reject = 4, 4

    def __init__(self, wary: float) -> None:
        super().__init__()
        self.inner, self.wary = Small(scale=6.0), wary

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        refusal = logits.amax(1) + self.wary * (x.flatten(1).mean(1) - 0.55)
        return torch.cat([logits, refusal[:, None]], 1)


@pytest.mark.parametrize("targets", [0, 4])
@pytest.mark.parametrize("loss", [cross_entropy, margin, Combined(), dlr])
def test_refusals_are_neither_aims_nor_wins(loss: Loss, targets: int) -> None:
    model, x = Detector(30.0), 0.9 * images(12)
    y = model.inner(x).argmax(1)
    assert torch.equal(decided(model, x), y)
    seen.clear()
    result = Watched(ThreatModel("linf", 0.2), 20, loss=loss, targets=targets)(model, x, y)
    assert all((each[2] < 4).all() for each in seen if each[2] is not None)
    label = decided(model, result.x_adv)[result.success]
    assert (label != 4).all()
    assert (label != y[result.success]).all()
    assert result.success.double().mean() > 0.5


# what it costs, and what it bears


def test_a_random_model_costs_its_draws() -> None:
    x = images(3)
    model = Noisy(Small(), 4, 1e-6)
    y = decided(Small(), x)
    for given, draws in ((None, 20), (3, 3)):
        attack = APGD(NONE_BROKEN, 4, eot=given)
        result = attack(QueryOracle(model, 3, known_right=True), x, y)
        assert attack.adapted(True).cost(x.shape[1:]) == draws
        assert result.queries.tolist() == [4 * draws + 1] * 3


@pytest.mark.parametrize("budget", range(12))
def test_a_budget_that_ends_before_the_aims_is_borne(budget: int) -> None:
    model, x = Small(), images(3)
    y = decided(model, x)
    result = APGD(NONE_BROKEN, 3, loss=dlr, targets=2)(QueryOracle(model, 3, budget=budget, known_right=True), x, y)
    # the clean image is only asked about where a step can be paid for as well
    assert result.queries.tolist() == [0 if budget < 2 else min(budget, 9)] * 3


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_gradients_that_are_no_numbers_leave_finite_images(norm: str) -> None:
    class Kink(nn.Module):
        """The root has no slope at zero: the gradient is NaN throughout, or in the first pixel alone."""

        def __init__(self, pixels: int) -> None:
            super().__init__()
            self.inner, self.pixels = inner, pixels

        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, : self.pixels]
            return self.inner(x) + 0 * (first - first.detach()).sqrt().sum(1, keepdim=True)

    inner, x, y, distance = near_boundary(4, norm)
    threat = ThreatModel(norm, 1.25 * distance)  # type: ignore[arg-type]
    for pixels in (1, 192):
        result = APGD(threat, 20)(Kink(pixels), x, y)
        assert result.x_adv.isfinite().all()
        assert threat.within(result.x_adv, x).all()
        assert result.success.all() == (pixels == 1 and norm != "l1")


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    class Hole(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.where(x[:, :1, 0, 0] > 0.55, torch.nan, 0.0)

    model, x = Hole(), 0.45 + 0.1 * images(6)
    y = decided(model, x)
    out = APGD(ThreatModel("linf", 0.1), 20, random_start=False).perturb(model, x, y)
    assert out.isfinite().all()
    assert losses_of(model, out, y).isfinite().all()


# what is refused


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"targets": -1}, "targets"),
        ({"rho": 0.0}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"alpha": 1.1}, "alpha"),
        ({"eot": 0}, "eot"),
        ({"threat": ThreatModel("linf", "inf")}, "finite eps"),
        ({"threat": ThreatModel("l0", 3)}, "linf, l2 or l1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        APGD(**arguments)  # type: ignore[arg-type]
