"""Projections onto planes within the box against scipy's optimisers; the planes themselves against plain autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts.nets import Noisy, Small, decided, images
from scipy import optimize
from torch import Tensor, nn

from lit_adv.attacks import DeepFool
from lit_adv.hyperplanes import nearest_planes, rivals_at, step_onto
from lit_adv.oracle import QueryOracle
from lit_adv.search import Search
from lit_adv.state import State
from lit_adv.threat import Norm, ThreatModel


def shortest(norm: str, x: Tensor, normal: Tensor, gap: float) -> Tensor:
    """The shortest step of one image, from a linear programme (linf) or the root of the dual (l2)."""
    w, flat = normal.flatten().numpy(), x.flatten().numpy()
    least, most = -flat, 1 - flat
    if norm == "linf":
        size = len(w)
        plane = np.append(w, 0.0)[None]
        sides = np.block([[np.eye(size), -np.ones((size, 1))], [-np.eye(size), -np.ones((size, 1))]])
        found = optimize.linprog(
            np.append(np.zeros(size), 1.0), sides, np.zeros(2 * size), plane, [-gap],
            [*zip(least, most, strict=True), (0, None)],
        )  # fmt: skip
        assert found.success
        return torch.from_numpy(found.x[:size]).view_as(x)

    def step(multiplier: float) -> np.ndarray:
        moved: np.ndarray = np.clip(-multiplier * w, least, most)
        return moved

    root = optimize.brentq(lambda multiplier: w @ step(multiplier) + gap, -1e4, 1e4, xtol=1e-14, rtol=1e-14)
    return torch.from_numpy(step(root)).view_as(x)


def case(seed: int, count: int = 12, shape: tuple[int, ...] = (2, 3, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """Images with many pixels at and near the ends of the box, normals with zeros and gaps of either sign."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(count, *shape, generator=generator, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
    normal = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    normal[torch.rand(normal.shape, generator=generator) < 0.2] = 0
    reach = torch.where(normal > 0, x, 1 - x) * normal.abs(), torch.where(normal < 0, x, 1 - x) * normal.abs()
    down, up = (part.flatten(1).sum(1) for part in reach)
    share = torch.rand(count, generator=generator, dtype=torch.float64) * 0.95
    gap = torch.where(torch.arange(count) % 2 == 0, -share * up, share * down)
    return x, normal, gap


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_steps_are_the_shortest_within_the_box(norm: Norm, seed: int) -> None:
    x, normal, gap = case(seed)
    threat = ThreatModel(norm, "inf")
    step = step_onto(threat, x, normal, gap)
    torch.testing.assert_close((normal * step).flatten(1).sum(1), -gap, rtol=1e-9, atol=1e-12)
    assert (x + step).min() >= -1e-12
    assert (x + step).max() <= 1 + 1e-12
    free = step_onto(ThreatModel(norm, "inf", box=(-1e6, 1e6)), x, normal, gap)
    assert ((x + free < 0) | (x + free > 1)).flatten(1).any(1).sum() > 3  # the box matters in these cases
    for row in range(len(x)):
        best = shortest(norm, x[row], normal[row], float(gap[row]))
        size, least = (threat.distance(v[None], torch.zeros_like(v)[None]) for v in (step[row], best))
        torch.testing.assert_close(size, least, rtol=1e-6, atol=1e-9)
        if norm == "l2":  # which has one solution
            torch.testing.assert_close(step[row], best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_a_box_steps_have_their_closed_form(norm: Norm) -> None:
    x, normal, gap = case(2)
    threat = ThreatModel(norm, "inf", box=(-1e6, 1e6))
    step = step_onto(threat, x, normal, gap)
    flat = normal.flatten(1)
    if norm == "linf":
        expected = -(gap / flat.abs().sum(1))[:, None] * flat.sign()
    else:
        expected = -(gap / flat.square().sum(1))[:, None] * flat
    torch.testing.assert_close(step.flatten(1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_where_no_image_reaches_the_plane_the_corner_nearest_to_it_is_taken(norm: Norm) -> None:
    x, normal, gap = case(3)
    step = step_onto(ThreatModel(norm, "inf"), x, normal, 1e3 * gap.sign())
    up = normal * -gap.sign()[:, None, None, None] > 0
    corner = torch.where(up, 1.0, 0.0).to(x.dtype)
    torch.testing.assert_close(x + step, torch.where(normal == 0, x, corner))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nothing_moves_without_a_gap_or_a_normal(norm: Norm) -> None:
    x, normal, gap = case(4)
    threat = ThreatModel(norm, "inf")
    assert not step_onto(threat, x, normal, 0 * gap).any()
    assert not step_onto(threat, x, 0 * normal, gap).any()
    assert not step_onto(threat, x, 0 * normal, 0 * gap).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20])
def test_single_precision_suffices_for_large_images_and_any_scale(norm: Norm, scale: float) -> None:
    x, normal, gap = case(5, 2, (3, 200, 200))
    threat = ThreatModel(norm, "inf")
    exact = step_onto(threat, x, normal, gap)
    single = step_onto(threat, x.float(), (normal * scale).float(), (gap * scale).float()).double()
    assert single.isfinite().all()
    torch.testing.assert_close(threat.distance(single, 0 * x), threat.distance(exact, 0 * x), rtol=1e-3, atol=0)
    assert ((single - exact).flatten(1).norm(dim=1) < 2e-3 * exact.flatten(1).norm(dim=1)).all()


# the planes


class Refusing(nn.Module):
    """A net whose last column is a refusal."""

    reject = 4

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small(classes=5, scale=4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def begun(model: nn.Module, threat: ThreatModel, y: Tensor, target: Tensor | None = None) -> tuple[Search, State]:
    x, rows = images(len(y)), torch.arange(len(y))
    search = Search(DeepFool(threat), QueryOracle(model, len(y)), x, y, target, rows)
    return search, State(**search.fresh(rows))


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["plain", "targeted", "refusing"])
def test_the_nearest_plane_is_that_of_autograd(norm: Norm, kind: str) -> None:
    model: nn.Module = Refusing() if kind == "refusing" else Small(scale=4.0)
    x = images(8)
    with torch.no_grad():
        y = model(x)[:, :4].argmax(1)
    target = (y + 1) % 4 if kind == "targeted" else None
    search, state = begun(model, ThreatModel(norm, "inf"), y, target)
    rivals, clean, unknown = rivals_at(search, state.rows, 10, 1)
    assert not unknown.any()
    planes = nearest_planes(search, state, rivals, 1)
    torch.testing.assert_close(planes.margin, clean)
    for row in range(8):
        scores, slopes = model(x[row : row + 1])[0].detach(), jacobian(model, x[row])
        own = int(y[row])
        if kind == "refusing" and scores[4] > scores[own]:
            own = 4
        pairs = [(k, own) for k in range(4) if k != int(y[row])]
        if target is not None:
            goal = int(target[row])
            pairs = [(goal, max((k for k in range(4) if k != goal), key=lambda k: float(scores[k])))]
        found = []
        for theirs, ours in pairs:
            gap, slope = scores[theirs] - scores[ours], slopes[theirs] - slopes[ours]
            size = slope.abs().sum() if norm == "linf" else slope.norm()
            found.append((float(gap.abs() / size), gap, slope))
        distance, gap, slope = min(found, key=lambda entry: entry[0])
        assert float(planes.distance[row]) == pytest.approx(distance)
        torch.testing.assert_close(planes.gap[row], gap)
        torch.testing.assert_close(planes.normal[row], slope)


def test_refusals_are_met_in_these_cases() -> None:
    scores = Refusing()(images(8))
    assert 0 < int((scores.argmax(1) == 4).sum()) < 8


def test_planes_are_averaged_over_draws() -> None:
    model = Noisy(Small(scale=4.0), 4)
    y = decided(model.model, images(3))
    search, state = begun(model, ThreatModel("l2", "inf"), y)
    rivals = torch.stack([(y + k) % 4 for k in (1, 2, 3)], 1)
    planes = nearest_planes(search, state, rivals[:, :1], 5)
    gaps, normals = [], []
    for number in range(5):
        other, _ = begun(model, ThreatModel("l2", "inf"), y)
        other.oracle.queries += number
        one = nearest_planes(other, state, rivals[:, :1], 1)
        gaps.append(one.gap)
        normals.append(one.normal)
    torch.testing.assert_close(planes.gap, torch.stack(gaps).mean(0))
    torch.testing.assert_close(planes.normal, torch.stack(normals).mean(0))
    assert (search.oracle.queries - search.checks).tolist() == [5, 5, 5]


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_rivals_are_the_likeliest_classes(classes: int) -> None:
    model = Refusing()
    x = images(6)
    scores = model(x).detach()
    y = scores[:, :4].argmax(1)
    search, state = begun(model, ThreatModel(), y)
    rivals, _, _ = rivals_at(search, state.rows, classes, 1)
    for row in range(6):
        order = [k for k in scores[row].argsort(descending=True).tolist() if k not in (int(y[row]), 4)]
        assert rivals[row].tolist() == order[: classes - 1]
    assert search.checks.tolist() == [1] * 6


def test_useless_gradients_give_no_plane() -> None:
    class Parallel(nn.Module):
        """A class that is no nearer anywhere, and one that is."""

        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, 0]
            return torch.stack([first + 5, first + 4.999, 3 * first], 1)

    class Broken(Parallel):
        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, :1]
            return super().forward(x) + (first - first.detach()).abs().sqrt()  # of slope 0 times inf

    y = torch.zeros(2, dtype=torch.int64)
    search, state = begun(Parallel(), ThreatModel("l2", "inf"), y)
    rivals = torch.tensor([[1, 2], [1, 2]])
    planes = nearest_planes(search, state, rivals, 1)
    torch.testing.assert_close(planes.distance, (5 - 2 * state.x.flatten(1)[:, 0]) / 2)
    search, _ = begun(Broken(), ThreatModel("l2", "inf"), y)
    for none in (
        nearest_planes(search, state, rivals, 1),
        nearest_planes(begun(Parallel(), ThreatModel("l2", "inf"), y)[0], state, rivals[:, :1], 1),
    ):
        assert (none.distance == torch.inf).all()
        assert not none.normal.any()
        assert not none.gap.any()
