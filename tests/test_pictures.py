"""Pictures: the right pixels in the right place."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from lit_adv.metrics import Records
from lit_adv.pictures import Examples, Line, curves_png, examples_png, image_grid, panels, png


def examples(m: int, channels: int = 3, size: tuple[int, int] = (8, 6), change: float = 0.25) -> Examples:
    x0 = torch.full((m, channels, *size), 0.5)
    x_adv = x0.clone()
    x_adv[:, :, 0, 0] += change
    numbers = torch.arange(m)
    return Examples(numbers, numbers, numbers + 1, x0, x_adv)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_clean_adversarial_and_difference(channels: int) -> None:
    grid = image_grid(examples(5, channels, size=(32, 32)), rows=2)
    # enlarged twice, with two pixels around each picture
    assert grid.shape == (3, 2 + 2 * 66, 2 + 3 * 66)
    assert (grid[:, :2] == 1).all()
    pictures = [grid[:, 2:66, 2 + 66 * i : 66 + 66 * i] for i in range(3)]
    assert (pictures[0] == 0.5).all()
    for picture, changed in zip(pictures[1:], (0.75, 1.0), strict=True):
        assert torch.allclose(picture[:, :2, :2], torch.tensor(changed))
        assert (picture[:, 2:] == 0.5).all()
        assert (picture[:, :2, 2:] == 0.5).all()


def test_large_images_are_not_enlarged() -> None:
    assert image_grid(examples(1, size=(64, 70))).shape == (3, 68, 2 + 3 * 72)


@pytest.mark.parametrize(("change", "factor"), [(0.25, 2.0), (-0.1, 5.0), (0.0, 1.0)])
def test_difference_is_amplified_to_the_full_range(change: float, factor: float) -> None:
    (panel,) = panels(examples(1, change=change))
    assert panel.factor == pytest.approx(factor)
    expected = 0.5 + (0.5 if change > 0 else -0.5 if change < 0 else 0.0)
    assert panel.difference[:, 0, 0].tolist() == pytest.approx([expected] * 3)
    assert (panel.difference[:, 1:] == 0.5).all()


def test_bad_examples_are_refused() -> None:
    good = examples(2)
    with pytest.raises(ValueError, match="examples need one length"):
        Examples(good.index[:1], good.label, good.predicted, good.x0, good.x_adv)
    with pytest.raises(ValueError, match="needs an example and a row, got 0 examples, rows = 8"):
        image_grid(examples(0))


def test_png_keeps_pixels() -> None:
    image = torch.randint(0, 256, (3, 5, 7))
    decoded = Image.open(io.BytesIO(png(image / 255)))
    assert decoded.size == (7, 5)
    assert [decoded.getpixel((x, 2)) for x in range(7)] == [tuple(image[:, 2, x].tolist()) for x in range(7)]


def test_drawings_are_png_files() -> None:
    lines = [Line("none", Records.empty(), attack=i, model=i // 7) for i in range(9)]
    for data in (curves_png([]), curves_png(lines), curves_png(lines[:1], dark=True), examples_png(examples(2, 1))):
        assert Image.open(io.BytesIO(data)).format == "PNG"
