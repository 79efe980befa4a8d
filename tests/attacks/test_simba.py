"""SimBA against the algorithm written out, and against a linear classifier's closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.fft
import torch
from contracts.nets import Counting, Recording, Small, decided, images, near_boundary, safe
from torch import Tensor, nn

from lit_adv.attacks import SimBA
from lit_adv.attacks.simba import _bands, _vectors
from lit_adv.draws import Draws
from lit_adv.losses import margin
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

FREE = ThreatModel("l2", "inf")
pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")


def hopeless(count: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear classifier of two classes that nothing fools, images, labels, and the gradient of the margin."""
    model, x, y, _ = near_boundary(count, "l2")
    with torch.no_grad():
        model.bias[1] -= 1000
        model.bias[2:] -= 1e5
        gradient = (model.weight[1] - model.weight[0]).view(x.shape[1:])
    return model, x, y, gradient


def order_of(attack: SimBA, index: int, shape: tuple[int, int, int]) -> list[int]:
    places: list[int] = attack.order(Draws(attack.seed, torch.tensor([index]), torch.tensor([-1])), torch.Size(shape))[
        0
    ].tolist()
    return places


def vector(place: int, basis: str, shape: tuple[int, int, int]) -> Tensor:
    """One vector of the basis: a pixel, or a cosine by another library."""
    unit = torch.zeros(shape, dtype=torch.float64)
    unit.view(-1)[place] = 1
    if basis == "pixel":
        return unit
    return torch.from_numpy(scipy.fft.idctn(unit.numpy(), axes=(1, 2), norm="ortho"))


def reference(
    model: nn.Module, x: Tensor, y: int, target: int | None, attack: SimBA, places: list[int]
) -> tuple[Tensor, int, bool]:
    """Algorithm 1 on one image: its last image, its queries, and whether it won."""
    queries = 0

    def asked(image: Tensor) -> tuple[float, bool]:
        nonlocal queries
        queries += 1
        shares = model(image[None])[0].softmax(0)
        won = int(shares.argmax()) != y if target is None else int(shares.argmax()) == target
        return float(-shares[y] if target is None else shares[target]), won

    delta, image = torch.zeros_like(x), x
    best, won = asked(x)
    for place in places[: attack.steps]:
        for sign in (1, -1):
            if won:
                return image, queries, True
            moved = delta + sign * attack.step_size * vector(place, attack.basis, tuple(x.shape))  # type: ignore[arg-type]
            tried = attack.threat.project((x + moved)[None], x[None])[0]
            value, won = asked(tried)
            if value > best or won:
                delta, image, best = moved, tried, value
                break
    return image, queries, won


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize(("norm", "eps"), [("l2", "inf"), ("l2", 0.6), ("linf", 0.06)])
@pytest.mark.parametrize("targeted", [False, True])
def test_agrees_with_the_algorithm(basis: Any, norm: Any, eps: Any, targeted: bool) -> None:
    x, model = images(4), Small(scale=3.0)
    y = decided(model, x)
    target = (y + 1) % 4 if targeted else None
    attack = SimBA(ThreatModel(norm, eps), 60, 0.15, basis)
    result = attack(model, x, y, target)
    for row in range(4):
        with torch.no_grad():
            image, queries, won = reference(
                model,
                x[row],
                int(y[row]),
                None if target is None else int(target[row]),
                attack,
                order_of(attack, row, (3, 8, 8)),
            )
        assert result.success[row] == won
        assert result.queries[row] == queries
        torch.testing.assert_close(result.x_adv[row], image)


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_takes_exactly_the_improving_steps_of_a_linear_model(basis: Any) -> None:
    model, x, y, gradient = hopeless(3)
    counting = Counting(model, x)
    attack = SimBA(FREE, 1000, 0.003, basis, loss=margin)
    result = attack(QueryOracle(counting, 3), x, y)
    slopes = torch.stack([(vector(place, basis, (3, 8, 8)) * gradient).sum() for place in range(192)])
    with torch.no_grad():
        gained = margin(model(result.x_adv), y) - margin(model(x), y)
    torch.testing.assert_close(gained, (0.003 * slopes.abs().sum()).expand(3))
    torch.testing.assert_close((result.x_adv - x).flatten(1).norm(dim=1).mean().item(), 0.003 * math.sqrt(192))
    assert result.queries.tolist() == counting.seen.tolist() == [1 + 192 + int((slopes < 0).sum())] * 3
    assert not result.checks.any()
    assert result.iterations.tolist() == [192] * 3  # the basis is used up


def test_fewer_steps_than_the_basis_has() -> None:
    model, x, y, gradient = hopeless(2)
    attack = SimBA(FREE, 50, 0.003, loss=margin)
    result = attack(model, x, y)
    for row in range(2):
        places = order_of(attack, row, (3, 8, 8))[:50]
        assert (
            (result.x_adv - x)[row].flatten().nonzero().squeeze(1).sort().values == torch.tensor(sorted(places))
        ).all()
        assert result.queries[row] == 51 + int((gradient.flatten()[places] < 0).sum())


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_the_basis_is_orthonormal(size: int) -> None:
    for basis in ("pixel", "dct"):
        vectors = _vectors(basis, size)
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(size, dtype=torch.float64))
    expected = torch.from_numpy(scipy.fft.dct(torch.eye(size, dtype=torch.float64).numpy(), axis=0, norm="ortho"))
    torch.testing.assert_close(_vectors("dct", size), expected)


def test_orders_are_permutations_of_their_own() -> None:
    attack = SimBA(basis="dct")
    draws = Draws(0, torch.arange(200), torch.full((200,), -1))
    orders = attack.order(draws, torch.Size((2, 3, 4)))
    assert (orders.sort(1).values == torch.arange(24)).all()
    assert len({tuple(order) for order in orders.tolist()}) == 200
    assert orders.double().mean(0).std() < 5 * 24 / math.sqrt(12 * 200)


@pytest.mark.parametrize(("frequencies", "stride"), [(2, 3), (3, 1), (2, 0), (9, 2)])
def test_low_frequencies_come_first(frequencies: int, stride: int) -> None:
    attack = SimBA(basis="dct", frequencies=frequencies, stride=stride)
    order = order_of(attack, 3, (2, 7, 5))
    highest = [max(place // 5 % 7, place % 5) for place in order]
    edge, done = frequencies, 0
    while done < len(order):
        part = highest[done : done + sum(h < edge for h in highest[done:])]
        assert all(h < edge for h in part)
        done += len(part)
        edge += stride if stride else 100
        if not stride:
            break
    assert done == len(order)
    assert len(set(order)) == len(order) == (2 * frequencies**2 if not stride else 70)
    _, bands = _bands((2, 7, 5), frequencies, stride)
    assert bands.min() == 0


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.05), ThreatModel("l2", 0.3)], ids=["linf", "l2"])
def test_every_query_lies_in_ball_and_box(basis: Any, threat: ThreatModel) -> None:
    model, x, y = safe(count=1)
    x[0, 0], x[0, 1, 0] = 0, 1
    recording = Recording(model)
    SimBA(threat, 100, 0.2, basis, loss=margin)(recording, x, y)
    given = torch.cat(recording.given)
    assert threat.within(given, x.expand_as(given)).all()
    assert (threat.distance(given, x.expand_as(given)) > 0.9 * threat.radius).sum() > 20


def test_both_signs_are_never_asked_at_once() -> None:
    model, x, y, _ = hopeless(6)
    recording = Recording(model)
    result = SimBA(FREE, 20, 0.003, loss=margin)(QueryOracle(recording, 6, chunk=6), x, y)
    assert all(len(given) <= 6 for given in recording.given)
    assert len(recording.given) == int(result.queries.max())


@pytest.mark.parametrize("targeted", [False, True])
def test_finds_what_exists_on_a_linear_model(targeted: bool) -> None:
    model, x, y, distance = near_boundary(5, "l2")
    target = y + 1 if targeted else None
    # small steps along every pixel end at the sign of the gradient, sqrt(2 / pi) of the best direction
    won = SimBA(ThreatModel("l2", 1.4 * distance), 192, 0.3 * distance)(model, x, y, target)
    assert won.success.all()
    lost = SimBA(ThreatModel("l2", 0.95 * distance), 192, 0.3 * distance)(model, x, y, target)
    assert not lost.success.any()


def test_an_answer_that_is_no_number_is_no_step() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)
            return torch.where((x.flatten(1).sum(1) * 1000).long()[:, None] % 2 == 0, torch.nan, scores)

    x = 0.2 + 0.6 * images(6)
    result = SimBA(FREE, 100, 0.1)(Broken(), x, torch.zeros(6, dtype=torch.int64))
    assert result.x_adv.isfinite().all()
    assert not result.success.any()
    assert result.nonfinite > 0
    assert (result.x_adv != x).any()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"threat": ThreatModel("l1", 3.0)}, "l1"),
        ({"steps": 0}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": float("nan")}, "step_size"),
        ({"step_size": float("inf")}, "step_size"),
        ({"basis": "wavelet"}, "basis"),
        ({"frequencies": 0, "basis": "dct"}, "frequencies"),
        ({"frequencies": 4}, "frequencies"),
        ({"stride": -1}, "stride"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SimBA(**arguments)
