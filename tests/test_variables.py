"""ZOO's variables: interpolation, probes one coordinate apart, and the slopes of the squared distance."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from contracts.nets import Small, decided, images
from torch import Tensor

from lit_adv.attacks import ZOO
from lit_adv.threat import ThreatModel
from lit_adv.variables import Space, Variables

pytestmark = pytest.mark.filterwarnings("ignore:.*was in training mode")
BOX = (0.0, 1.0)
SPACES: list[Space] = ["pixel", "tanh"]
GRIDS: list[tuple[int, ...]] = [(), (3, 5, 7)]


def problem(space: Space, sides: tuple[int, ...]) -> tuple[Variables, Tensor, Tensor, Tensor, Tensor]:
    """Variables, clean images of 9 x 12 pixels, perturbations, levels, and origins."""
    x0 = 0.2 + 0.6 * images(3, 3, (2, 9, 12))
    variables = Variables.of(space, BOX, sides, x0)
    level = torch.tensor([0, 1, 2]) if sides else torch.zeros(3, dtype=torch.int64)
    w = torch.zeros(3, 2, *variables.grid, dtype=x0.dtype)
    for row in range(3):
        high, wide = variables.sizes[int(level[row])]
        w[row, :, :high, :wide] = 0.1 * images(1, 8 + row, (2, high, wide))[0] - 0.05
    return variables, x0, w, level, variables.origin(x0)


def rendered(variables: Variables, x0: Tensor, w: Tensor, level: Tensor) -> Tensor:
    """The same images by torch's own interpolation, row by row."""
    rows = []
    for row in range(len(x0)):
        high, wide = variables.sizes[int(level[row])]
        part = w[row : row + 1, :, :high, :wide]
        grown = F.interpolate(part, x0.shape[-2:], mode="bilinear", align_corners=False)[0]
        if variables.space == "pixel":
            rows.append(x0[row] + grown)
        else:
            rows.append(0.5 + 0.5 * (((2 * x0[row] - 1) * 0.9999995).atanh() + grown).tanh())
    return torch.stack(rows)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sides", GRIDS)
def test_images_are_bilinear_interpolations_of_the_grid(space: Space, sides: tuple[int, ...]) -> None:
    variables, x0, w, level, origin = problem(space, sides)
    torch.testing.assert_close(variables.images(w, origin, level), rendered(variables, x0, w, level))
    torch.testing.assert_close(variables.images(0 * w, origin, level), x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sides", GRIDS)
def test_probes_move_one_coordinate(space: Space, sides: tuple[int, ...]) -> None:
    variables, x0, w, level, origin = problem(space, sides)
    place = torch.tensor([[0, 5, 2], [1, 9, 3], [33, 4, 40]])
    x = variables.images(w, origin, level)
    found = variables.probes(x, w, origin, level, place, 1e-2)
    assert found.shape == (3, 6, 2, 9, 12)
    for number, sign in itertools.product(range(3), (0, 1)):
        moved = w.flatten(1).clone()
        moved[torch.arange(3), place[:, number]] += 1e-2 * (1 - 2 * sign)
        expected = rendered(variables, x0, moved.view_as(w), level)
        torch.testing.assert_close(found[:, 2 * number + sign], expected)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("sides", GRIDS)
def test_slopes_of_the_squared_distance(space: Space, sides: tuple[int, ...]) -> None:
    variables, x0, w, level, origin = problem(space, sides)
    place = torch.tensor([[0, 5, 2], [1, 9, 3], [33, 4, 40]])
    first, second = variables.distance_slopes(w, origin, level, place)
    start = rendered(variables, x0, 0 * w, level)

    def distance(number: int, step: float) -> Tensor:
        moved = w.flatten(1).clone()
        moved[torch.arange(3), place[:, number]] += step
        return (rendered(variables, x0, moved.view_as(w), level) - start).pow(2).flatten(1).sum(1)

    for number in range(3):
        up, here, down = (distance(number, step) for step in (1e-4, 0.0, -1e-4))
        torch.testing.assert_close(first[:, number], (up - down) / 2e-4, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(second[:, number], (up - 2 * here + down) / 1e-8, rtol=1e-4, atol=1e-6)
    still, _ = variables.distance_slopes(0 * w, origin, level, place)
    assert not still.any()  # no round-off for Adam to follow


def test_pixels_of_a_grid_are_cut_to_the_box() -> None:
    x0 = images(1, 1, (1, 8, 8)).round()
    variables = Variables.of("pixel", BOX, (4,), x0)
    w = 0.3 * (images(1, 2, (1, 4, 4)) - 0.5)
    level = torch.zeros(1, dtype=torch.int64)
    image = variables.images(w, x0, level)
    grown = F.interpolate(w, (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(image, (x0 + grown).clamp(0, 1))
    first, _ = variables.distance_slopes(w, x0, level, torch.arange(16)[None])
    leaf = w.clone().requires_grad_()
    moved = F.interpolate(leaf, (8, 8), mode="bilinear", align_corners=False)
    (slope,) = torch.autograd.grad((((x0 + moved).clamp(0, 1) - x0) ** 2).sum(), leaf)
    torch.testing.assert_close(first, slope.flatten(1))


def test_a_larger_grid_continues_the_smaller_one() -> None:
    x0 = images(2, 1, (2, 16, 16))
    variables = Variables.of("tanh", BOX, (4, 8), x0)
    w = torch.zeros(2, 2, 8, 8, dtype=x0.dtype)
    w[..., :4, :4] = images(2, 5, (2, 4, 4))
    expected = F.interpolate(w[..., :4, :4], (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(variables.enlarged(w, 0), expected)


def test_importance_is_the_largest_change_of_a_tile() -> None:
    x0 = images(2, 1, (1, 64, 64))
    variables = Variables.of("tanh", BOX, (16, 32), x0)
    w = torch.zeros(2, 1, 32, 32, dtype=x0.dtype)
    w[0, 0, 3, 5] = -4.0  # in tile (1, 2) of 8 x 8, which is rows 4-7 and columns 8-11 of the larger grid
    w[0, 0, 10, 0] = 1.0
    weight = variables.importance(w, 0, (32, 32))
    expected = torch.full((32, 32), 1e-12, dtype=x0.dtype)
    expected[4:8, 8:12], expected[20:24, 0:4] = 1.0, 0.25
    torch.testing.assert_close(weight[0, 0], expected)
    assert (weight[1] == 1).all()  # nothing has moved: all alike


def test_small_images_keep_their_own_size() -> None:
    x0 = images(1, 1, (3, 8, 12))
    variables = Variables.of("tanh", BOX, (32, 64, 128), x0)
    assert variables.sizes == ((8, 12),) * 3
    assert variables.same


def test_the_grid_grows_on_its_schedule_and_coordinates_follow_importance() -> None:
    """What moves in the next iteration after a resizing lies, on the larger grid, in tiles that had changed."""
    model, x = Small(shape=(3, 16, 16)), images(2, 4, (3, 16, 16))
    y = decided(model, x)
    seen = []

    class Watched(ZOO):
        def _update(self, search: object, state: object, at: Tensor) -> None:
            seen.append((state.level.clone(), state.place.clone(), state.weight.clone(), state.tau.clone()))  # type: ignore[attr-defined]
            super()._update(search, state, at)  # type: ignore[arg-type]

    attack = Watched(ThreatModel("l2", "inf"), 4, 1, 6, sides=(4, 8), resize_at=(2,), early_stop=None, constant=1.0)
    attack(model, x, y)
    assert [level.tolist() for level, *_ in seen] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    for level, place, weight, _ in seen:
        row, column = place % 64 // 8, place % 8
        side = 4 if int(level[0]) == 0 else 8
        assert (row < side).all()
        assert (column < side).all()
        assert all(len(set(places)) == 6 for places in place.tolist())
        if side == 8:
            assert (weight.gather(1, place) > 1e-6).all()
    assert not seen[2][3].any()  # Adam's counters begin anew
    assert seen[3][3].sum() == 12
