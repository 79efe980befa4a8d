"""NAttack's further ways: the released loss, the nearest image, a given start, and populations that tell nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from contracts.nets import Counting, Recording, Small, decided, images, near_boundary, safe
from torch import Tensor, nn

from lit_adv.attack import Search, State
from lit_adv.attacks import NAttack
from lit_adv.attacks.nattack import NAttackState
from lit_adv.losses import hinge, margin
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
FAR = ThreatModel("l2", "inf")
BALL = ThreatModel("linf", 0.1)


class Times(nn.Module):
    """A model whose logits are multiplied."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.factor


class Flat(nn.Module):
    """The same answer everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.flatten(1)[:, :3] + torch.tensor([5.0, 1, 0], dtype=x.dtype)


def moved(attack: NAttack, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (attack.perturb(model, x, y, index=torch.arange(len(x))) - x).flatten(1).abs().amax(1)


def test_the_released_loss_is_blind_where_the_network_is_sure_and_the_margin_is_not() -> None:
    """Once the probability of the true class rounds to 1 the released rewards are all equal (specified so)."""
    model, x = Small(scale=1.0).float().eval(), images(12, dtype=torch.float32)
    top = model(x).detach().topk(2).values
    x = x[(top[:, 0] - top[:, 1]).topk(4).indices]  # the surest
    y = decided(model, x)
    settings = {"threat": BALL, "steps": 3, "samples": 20, "step_size": 0.05, "init_std": 0.0, "shrink": 1e-6}
    for factor, blind in ((1.0, False), (1e4, True)):
        released = moved(NAttack(**settings, loss="released"), Times(model, factor), x, y)  # type: ignore[arg-type]
        assert ((released < 1e-5) == blind).all()
        assert (moved(NAttack(**settings, loss=margin), Times(model, factor), x, y) > 0.01).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("access", [Access.PROBS, Access.LOGITS])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_released_loss_is_the_same_in_blocks_of_any_size(access: Access, targeted: bool) -> None:
    x = images(5)
    y = decided(Small(), x)
    target = (y + 1) % 4 if targeted else None

    def run(block: int) -> Tensor:
        attack = NAttack(ThreatModel("linf", 0.02), 3, 12, 0.05, loss="released", block=block, stop_at_hit=False)
        return attack(QueryOracle(Small(), 5, access, known_right=True), x, y, target).x_adv

    for block in (1, 5, 7):
        torch.testing.assert_close(run(block), run(12), rtol=0, atol=1e-9)


def test_targeted_released_loss_pulls_towards_the_target() -> None:
    x = images(6)
    y = decided(Small(), x)
    target = (y + 1) % 4
    attack = NAttack(ThreatModel("linf", 0.5), 40, 30, 0.1, shrink=0.1, loss="released")
    result = attack(Small(), x, y, target)
    assert result.success.double().mean() > 0.4
    assert torch.equal(decided(Small(), result.x_adv)[result.success], target[result.success])


def test_the_order_of_the_population_does_not_matter() -> None:
    class Shuffled(NAttack):
        def _population(self, search: Search, state: NAttackState) -> Tensor:
            return super()._population(search, state).flip(1)

    model, x, y = safe()
    plain, shuffled = (kind(BALL, 4, 10, 0.05, loss=margin, block=10) for kind in (NAttack, Shuffled))
    torch.testing.assert_close(
        shuffled.perturb(model, x, y, index=torch.arange(3)), plain.perturb(model, x, y, index=torch.arange(3))
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_latent_drawn_again_in_a_smaller_ball_is_nearer(norm: str) -> None:
    x0 = images(4)
    attack = NAttack(ThreatModel(norm, 0.3), 5, 20, 0.1, init_std=1.0)  # type: ignore[arg-type]
    oracle = QueryOracle(Small(), 4)
    y, rows = decided(Small(), x0), torch.arange(4)
    state = attack.start(Search(attack, oracle, x0, y, None, rows), rows)
    before = torch.full((4,), torch.inf, dtype=x0.dtype)
    for radius in (0.3, 0.2, 0.05, 0.0):
        smaller = attack.with_threat(ThreatModel(norm, radius))  # type: ignore[arg-type]
        distance = smaller.threat.distance(smaller.render(state)[:, 0], x0)
        assert (distance <= radius + 1e-9).all()
        assert (distance <= before + 1e-12).all()
        before = distance


def test_a_latent_of_the_images_size_is_not_resampled() -> None:
    model, x, y = safe()
    one, other = (NAttack(BALL, 3, 10, 0.05, loss=margin, latent=latent) for latent in (8, 32))
    assert torch.equal(
        one.perturb(model, x, y, index=torch.arange(3)), other.perturb(model, x, y, index=torch.arange(3))
    )


def test_populations_with_equal_rewards_are_counted_and_warned_of() -> None:
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    result = NAttack(BALL, 49, 4)(Flat(), x, y)
    assert result.counts == {"populations with equal rewards": (3 * 49, 3 * 49)}
    with pytest.warns(UserWarning, match="50 populations in a row were all equal"):
        NAttack(BALL, 50, 4, block=2)(Flat(), x, y)
    model, x, y = safe()
    assert NAttack(BALL, 60, 4)(model, x, y).counts == {"populations with equal rewards": (0, 180)}
    broken, x = Small().eval(), images(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = NAttack(ThreatModel("linf", 0.5), 120, 4, 0.1, stop_at_hit=False)(broken, x, decided(broken, x))
    assert ended.success.all()  # rewards of 0 once all samples have won are no ground for a warning
    assert ended.counts["populations with equal rewards"][0] > 3 * 50


def test_where_all_samples_have_won_the_mean_is_looked_at_at_once() -> None:
    model, x, y, distance = near_boundary(3, "l2")
    with torch.no_grad():
        model.bias[1] += 4.5  # all is class 1 now, but for the images
    pulled = NAttack(
        ThreatModel("l2", 10 * distance), 30, 6, schedule="mean", check_every=1000, init_std=0.0, sigma=1e-6
    )

    class Late(nn.Module):
        """Right on the very first image asked, wrong from then on."""

        asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += len(x)
            return model(x) - torch.tensor([[0.0, 100.0, 0.0]]) * (self.asked <= 3)

    result = pulled(QueryOracle(Late(), 3, chunk=64, known_right=True), x, y)
    assert result.success.all()
    assert result.iterations.tolist() == [1] * 3
    assert result.queries.tolist() == [1 + 6 + 1] * 3


def test_a_population_that_cannot_be_paid_whole_is_not_begun() -> None:
    inner, x, y = safe()
    model = Counting(inner, x)
    attack = NAttack(BALL, 9, 10, schedule="mean", check_every=2, block=4)
    spent = {9: 0, 10: 0, 11: 11, 12: 12, 20: 12, 21: 21, 31: 22, 32: 32, 33: 33}
    for budget, expected in spent.items():
        model.seen.zero_()
        result = attack(QueryOracle(model, 3, budget=budget, known_right=True), x, y)
        assert model.seen.tolist() == result.queries.tolist() == [expected] * 3, budget


def test_the_nearest_image_is_nearly_reached() -> None:
    model, x, y, distance = near_boundary(2, "l2")
    settings = {"objective": "distortion", "schedule": "mean", "check_every": 1}
    result = NAttack(FAR, 150, 60, 0.0005, 0.02, **settings)(model, x, y)  # type: ignore[arg-type]
    assert result.success.all()
    assert (decided(model, result.x_adv) != y).all()
    assert (result.distance >= 0.999 * distance).all()
    assert (result.distance <= 1.25 * distance).all()


def test_more_steps_never_keep_a_farther_image() -> None:
    model, x, y, _ = near_boundary(3, "l2")
    found = []
    for steps in (5, 20, 60):
        attack = NAttack(FAR, steps, 30, 0.02, 0.05, objective="distortion", schedule="mean", check_every=1)
        result = attack(model, x, y)
        found.append(result.distance)
        for row in range(3):
            trace = result.trace[result.trace[:, 0] == row, 3]
            assert (trace.diff() < 0).all()
            assert not len(trace) or trace[0] >= result.distance[row] == trace[-1]
    assert (found[1] <= found[0]).all()
    assert (found[2] <= found[1]).all()
    assert (found[2] < trace[0]).any()


def test_a_nearest_search_ends_in_a_finite_ball() -> None:
    model, x, y, distance = near_boundary(3, "l2")
    settings = {"objective": "distortion", "schedule": "mean", "check_every": 1}
    attack = NAttack(ThreatModel("l2", 2 * distance), 80, 30, 0.02, 0.05, **settings)  # type: ignore[arg-type]
    result = attack(right(model), x, y)
    assert result.success.all()
    assert torch.equal(result.queries, result.first_hit)


def right(model: nn.Module, rows: int = 3) -> QueryOracle:
    return QueryOracle(model, rows, known_right=True)


def test_the_weight_of_the_loss_is_searched_as_by_carlini_and_wagner() -> None:
    """Times 10 until it succeeds, then bisected; a new start for each."""
    seen: list[tuple[int, list[float], float]] = []

    class Watched(NAttack):
        def step(self, search: Search, state: State) -> State:
            assert isinstance(state, NAttackState)
            if int(state.phase[0]) == 0:
                seen.append((int(state.t[0]), state.constant[0].tolist(), float(state.phi.abs().max())))
            return super().step(search, state)

    def run(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
        seen.clear()
        Watched(
            FAR, 15, 4, 0.01, objective="distortion", constant=0.5, search_steps=5, init_std=0.001, block=2,
            schedule="mean", check_every=1,
        )(right(model, 1), x, y)  # fmt: skip
        assert [t for t, _, _ in seen] == list(range(15))
        assert all(size < 0.005 for t, _, size in seen if t % 3 == 0)
        assert all(seen[t][1][0] == seen[t - t % 3][1][0] for t in range(15))
        return [seen[t][1][0] for t in range(0, 15, 3)]

    model, x, y = safe(count=1)
    assert run(model, x, y) == pytest.approx([0.5, 5, 50, 500, 5000])
    assert run(model, x, y + 1) == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.03125])  # always a success


class Scaled(nn.Module):
    """A network that says where to begin; it has a mode, and weights in float32."""

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        self.weight, self.side = nn.Parameter(torch.tensor(3.0)), side
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        self.modes.append(self.training)
        return self.weight * (x[..., : self.side, : self.side] - 0.5)


@pytest.mark.parametrize("given", [Scaled(), lambda x: 3 * (x - 0.5)], ids=["module", "function"])
def test_a_given_start_is_where_the_search_begins(given: Callable[[Tensor], Tensor]) -> None:
    model, x, y = safe()
    recording = Recording(model)
    attack = NAttack(ThreatModel("linf", 0.2), 1, 4, schedule="mean", initial=given, initial_scale=0.1)
    attack(right(recording), x, y)
    begun = 0.5 * (torch.tanh(torch.atanh((2 * x - 1) * (1 - 1e-6)) + 0.3 * (x - 0.5)) + 1)
    torch.testing.assert_close(recording.given[0], begun, rtol=0, atol=1e-6)
    if isinstance(given, Scaled):
        assert given.training
        assert not any(given.modes)
        assert given.weight.grad is None


def test_a_given_start_of_the_latents_size() -> None:
    model, x, y = safe()
    attack = NAttack(BALL, 2, 4, latent=4, initial=Scaled(4))
    assert attack(model, x, y).queries.tolist() == [10] * 3
    with pytest.raises(
        ValueError, match=r"initial must return means of shape \(3, 3, 4, 4\) .* Scaled returned \(3, 3, 8"
    ):
        NAttack(BALL, 2, 4, latent=4, initial=Scaled())(model, x, y)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: [x], "initial must return means of shape .* returned list"),
        (lambda x: x * torch.nan, "initial returned NaN or inf"),
    ],
)
def test_a_broken_start_is_refused(given: Callable[[Tensor], Tensor], message: str) -> None:
    model, x, y = safe()
    with pytest.raises(ValueError, match=message):
        NAttack(BALL, 2, 4, initial=given)(model, x, y)


def test_a_reward_that_is_not_finite_is_dropped() -> None:
    def odd(scores: Tensor, y: Tensor, target: Tensor | None, reject: int | None) -> Tensor:
        values = hinge(scores, y, target, reject).clone()
        values[:, ::3] = torch.inf
        return values

    model, x, y = safe()
    result = NAttack(BALL, 3, 12, 0.05, loss=odd)(model, x, y)
    assert result.x_adv.isfinite().all()
    assert result.iterations.tolist() == [3] * 3
