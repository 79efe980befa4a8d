"""Square Attack against the paper's schedule, its algorithms written out with loops, and a linear classifier."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from contracts.nets import Counting, Recording, Small, decided, images, near_boundary, safe
from torch import Tensor, nn

from lit_adv.attacks import Square
from lit_adv.attacks.square import SquareState, _others, bump
from lit_adv.draws import Draws
from lit_adv.losses import margin
from lit_adv.oracle import QueryOracle
from lit_adv.search import Search
from lit_adv.threat import ThreatModel

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.7)


def right(model: nn.Module, rows: int, **more: Any) -> QueryOracle:
    """An oracle whose caller knows that the clean images are classified rightly."""
    return QueryOracle(model, rows, known_right=True, **more)


def searched(attack: Square, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> tuple[Search, SquareState]:
    """The state after some steps, of a search that ends no row."""
    search = Search(attack, right(model, len(x)), x, y, None, torch.arange(len(x)))
    state = attack.start(search, torch.arange(len(x)))
    with torch.no_grad():
        for _ in range(steps):
            attack.step(search, state)
            state.t += 1
    return search, state


@pytest.mark.parametrize("steps", [10000, 20000, 500])
def test_sizes_follow_the_table(steps: int) -> None:
    # share of the pixels that a square covers, by the iteration of 10,000 up to which it holds
    table = [(10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128), (8000, 256)]
    attack = Square(LINF, steps, 0.8)
    for iteration in [0, 1, 5, 11, 60, 199, 260, 499, steps // 2, steps - 2]:
        scaled = iteration * 10000 // steps
        shrunk = next((factor for last, factor in table if scaled <= last), 512)
        expected = max(1, round((0.8 / shrunk * 32 * 32) ** 0.5))
        assert attack.sides(torch.tensor([iteration + 1]), 32, 32).item() == expected
        odd = max(3, round((0.8 / shrunk * 32 * 32) ** 0.5))
        odd += 1 - odd % 2
        assert Square(L2, steps, 0.8).sides(torch.tensor([iteration + 1]), 32, 32).item() == odd


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (4, 4), (28, 28)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_squares_fit_into_the_image(height: int, width: int, norm: str) -> None:
    attack = Square(ThreatModel(norm, 0.5), 50, 1.0)  # type: ignore[arg-type]
    sides = attack.sides(torch.arange(50), height, width)
    assert sides.min() >= 1
    assert sides.max() <= min(height, width)
    model, x, y = safe(shape=(2, height, width))
    result = attack(right(model, len(x)), x, y)
    assert result.x_adv.isfinite().all()
    assert attack.threat.within(result.x_adv, x).all()


def test_proposals_paint_one_square_at_the_corners_of_the_ball() -> None:
    model, x, y = safe(count=1)
    recording = Recording(model)
    Square(LINF, 200, 0.3)(right(recording, 1), x, y)
    given = torch.cat(recording.given)
    lower, upper = (x - 0.1).clamp_min(0), (x + 0.1).clamp_max(1)
    assert ((given == lower) | (given == upper)).all()
    current, best = given[0], margin(model(given[:1]), y)
    up = given == upper
    assert (up[0] == up[0, :, :1]).all()  # stripes
    for number in range(1, 200):
        changed = given[number] != current
        assert changed.any()
        rows, columns = changed.any(0).any(1).nonzero(), changed.any(0).any(0).nonzero()
        side = int(Square(LINF, 200, 0.3).sides(torch.tensor([number]), 8, 8))
        assert rows.max() - rows.min() < side
        assert columns.max() - columns.min() < side
        for channel in range(3):
            painted = up[number, channel][changed[channel]]
            assert painted.all() or not painted.any()
        value = margin(model(given[number : number + 1]), y)
        if value > best:
            current, best = given[number], value


def test_signs_are_drawn_among_all_others() -> None:
    signs = torch.tensor([[1.0, -1, 1]]).repeat(7000, 1)
    others = _others(signs, torch.rand(7000, generator=torch.Generator().manual_seed(0)))
    assert not (others == signs).all(1).any()
    assert (others.abs() == 1).all()
    counts = Counter(tuple(row) for row in others.tolist())
    assert len(counts) == 7
    assert max(abs(count - 1000) for count in counts.values()) < 5 * 1000**0.5
    assert torch.equal(_others(torch.ones(3, 1), torch.rand(3)), -torch.ones(3, 1))


def test_the_bump_is_two_opposite_mounds() -> None:
    for side in (1, 2, 3, 5, 8):
        made = bump(side)
        assert made.norm().item() == pytest.approx(1)
        half = side // 2
        assert (made[:half] > 0).all()
        assert (made[half:] < 0).all()
    upper = bump(5)[:2] / bump(5)[:2].norm()
    assert upper.argmax().item() == 7  # the middle of the lower line: row 2 // 2, column 5 // 2
    rings = torch.tensor([[2, 1, 1, 1, 2], [2, 1, 0, 1, 2]])
    mound = torch.zeros(2, 5, dtype=torch.float64)
    for ring in range(3):
        mound += (rings <= ring) / (ring + 1) ** 2
    torch.testing.assert_close(upper, mound / mound.norm())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 10), (3, 8, 8)])
def test_the_l2_start_is_a_grid_of_bumps_on_the_surface(shape: tuple[int, int, int]) -> None:
    x = torch.full((4, *shape), 0.5, dtype=torch.float64)
    model, _, y = safe(count=4, shape=shape)
    _, state = searched(Square(ThreatModel("l2", 0.3)), model, x, y, 0)
    delta = state.x - x
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((4,), 0.3, dtype=torch.float64))
    side = min(shape[1:]) // 5
    top, left = (shape[1] % side) // 2, (shape[2] % side) // 2
    kinds = [bump(side), -bump(side), bump(side).T, -bump(side).T]
    for tile in delta[0, :, top:, left:].unfold(1, side, side).unfold(2, side, side).flatten(0, 2):
        assert any(torch.allclose(tile / tile.norm(), kind) for kind in kinds)
    assert not torch.equal(delta[0], delta[1])


def l2_step(x: Tensor, x0: Tensor, eps: float, side: int, uniform: Tensor) -> Tensor:
    """Algorithm 3 on one image with loops; two corners, whether to turn the bump, and signs from the numbers."""
    channels, height, width = x.shape
    corners = [int(u * (size - side + 1)) for u, size in zip(uniform[:4].tolist(), (height, width) * 2, strict=True)]
    pattern = bump(side).T if uniform[4] < 0.5 else bump(side)
    first = torch.zeros(height, width, dtype=torch.bool)
    second = first.clone()
    first[corners[0] : corners[0] + side, corners[1] : corners[1] + side] = True
    second[corners[2] : corners[2] + side, corners[3] : corners[3] + side] = True
    delta = x - x0
    unused = (eps**2 - delta.square().sum()).clamp_min(0)
    for channel in range(channels):
        sign = -1 if uniform[5 + channel] < 0.5 else 1
        old = delta[channel][first].view(side, side)
        new = sign * pattern + (old / old.norm() if old.norm() > 0 else 0)
        new = sign * pattern if new.norm() < 1e-6 else new  # the old content, turned round
        room = (delta[channel][first | second].square().sum() + unused / channels).sqrt()
        delta[channel][second] = 0
        delta[channel][first] = (new / new.norm() * room).flatten()
    torch.testing.assert_close(delta.norm(), torch.tensor(eps, dtype=delta.dtype))
    return (x0 + delta).clamp(0, 1)


@pytest.mark.parametrize("shape", [(1, 9, 12), (3, 8, 8)])
def test_l2_steps_agree_with_the_algorithm(shape: tuple[int, int, int]) -> None:
    model, x, y = safe(count=2, shape=shape)
    x[1, 0] = 0  # black: much of what is proposed is cut off by the box
    attack = Square(L2, 40, 0.4)
    for row in range(2):
        recording = Recording(model)
        search, state = searched(attack, recording, x[row : row + 1], y[:1], 1)
        for step in range(1, 25):
            uniform = Draws(0, torch.arange(1), torch.tensor([step])).uniform(1, 5 + shape[0])[0, 0]
            side = int(attack.sides(torch.tensor([step]), *shape[1:]))
            expected = l2_step(state.x[0].clone(), x[row], 0.7, side, uniform)
            with torch.no_grad():
                attack.step(search, state)
            state.t += 1
            torch.testing.assert_close(recording.given[-1][0], expected)


def test_l2_proposals_have_the_full_norm_or_less_at_the_box() -> None:
    model, x, y = safe(count=3)
    x[0], x[1] = 0, 0.5
    recording = Recording(model)
    Square(L2, 100, 0.2)(right(recording, 3, chunk=3), x, y)
    given = torch.stack(recording.given, 1)
    length = (given - x[:, None]).flatten(2).norm(dim=2)
    assert (length <= 0.7 * (1 + 1e-9)).all()
    torch.testing.assert_close(length[1], torch.full_like(length[1], 0.7))
    assert given.min() >= 0
    assert given.max() <= 1


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_loss_is_remembered_and_never_falls(threat: ThreatModel, targeted: bool) -> None:
    model, x, y = safe()
    target = (y + 1) % 3 if targeted else None
    attack = Square(threat, 60, 0.3, loss=margin)
    search = Search(attack, right(model, 3), x, y, target, torch.arange(3))
    state = attack.start(search, torch.arange(3))
    best = state.best
    with torch.no_grad():
        for _ in range(60):
            attack.step(search, state)
            state.t += 1
            assert (state.best >= best).all()
            best = state.best
            torch.testing.assert_close(best, margin(model(state.x), y, target))


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_queries_are_the_steps(threat: ThreatModel) -> None:
    model, x, y = safe()
    counting = Counting(model, x)
    known = Square(threat, 30)(right(counting, 3), x, y)
    assert known.queries.tolist() == counting.seen.tolist() == [30] * 3
    assert not known.checks.any()
    looked = Square(threat, 30)(model, x, y)
    assert (looked.queries - looked.checks).tolist() == [30] * 3
    assert looked.checks.tolist() == [1] * 3
    again = Square(threat, 30, restarts=2)(right(model, 3), x, y)
    assert again.queries.tolist() == [60] * 3


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("norm", "reach"), [("linf", 1.25), ("l2", 2.5)])
def test_finds_what_exists_on_a_linear_model(norm: Any, reach: float, targeted: bool) -> None:
    model, x, y, distance = near_boundary(6, norm)
    target = y + 1 if targeted else None
    won = Square(ThreatModel(norm, reach * distance), 2000, 0.2)(model, x, y, target)
    assert won.success.all()
    lost = Square(ThreatModel(norm, 0.95 * distance), 300, 0.2)(model, x, y, target)
    assert not lost.success.any()


def test_a_pixel_grid_and_an_unlimited_ball() -> None:
    x = images(6)
    model = Small(scale=4.0)
    y = decided(model, x)
    result = Square(ThreatModel("linf", "inf"), 100, 0.3)(model, x, y)
    assert result.success.all()
    grid = Square(ThreatModel("linf", 0.1, levels=255), 100, 0.3)(model, x, y)
    levels = grid.x_adv[grid.success] * 255
    torch.testing.assert_close(levels, levels.round())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"threat": ThreatModel("l1", 3.0)}, "l1"),
        ({"threat": ThreatModel("l2", "inf")}, "eps"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"p_init": 0.0}, "p_init"),
        ({"p_init": 1.5}, "p_init"),
        ({"p_init": float("nan")}, "p_init"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Square(**arguments)
