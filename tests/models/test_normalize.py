"""The first layer: normalisation against its formulas, and what it refuses."""

import math

import pytest
import torch

from lit_adv.models import ImageInput, Normalize, StandardizeImage


def test_normalize_takes_each_channel_by_its_own_numbers() -> None:
    x = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    out = Normalize([0.25, 0.5], [2.0, 4.0]).double()(x)
    torch.testing.assert_close(out[:, 0], (x[:, 0] - 0.25) / 2)
    torch.testing.assert_close(out[:, 1], (x[:, 1] - 0.5) / 4)


def test_one_number_serves_all_channels_and_lies_in_the_checkpoint() -> None:
    layer = Normalize([0.5], [0.5])
    torch.testing.assert_close(layer(torch.ones(1, 3, 2, 2)), torch.ones(1, 3, 2, 2))
    assert set(layer.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5, 0.5]), ([], []), ([0.5], [0.0]), ([0.5], [math.nan])])
def test_normalize_refuses_numbers_that_do_not_fit(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match="std"):
        Normalize(mean, std)


def test_standardize_follows_the_formula_pixel_by_pixel() -> None:
    x = torch.rand(3, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = StandardizeImage()(x)
    for image, got in zip(x.tolist(), out, strict=True):
        values = [v for channel in image for row in channel for v in row]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        scale = max(deviation, 1 / math.sqrt(len(values)))
        expected = [(v - mean) / scale for v in values]
        torch.testing.assert_close(got.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_standardize_floors_the_deviation_of_flat_images() -> None:
    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    x[0, 0, 0, 0] += 0.016  # its deviation is far below the floor 1/4
    torch.testing.assert_close(StandardizeImage()(x), (x - 0.501) * 4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_give_zeros_and_a_finite_gradient(value: float) -> None:
    x = torch.full((2, 3, 4, 4), value, requires_grad=True)
    out = StandardizeImage()(x)
    (gradient,) = torch.autograd.grad((out * torch.rand_like(out)).sum(), x)
    assert (out == 0).all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_padding_puts_zeros_around_before_normalisation() -> None:
    layer = ImageInput(1, mean=[0.5], std=[0.5], least_size=4)
    out = layer(torch.ones(1, 1, 3, 2))
    assert out.tolist() == [[[[-1, 1, 1, -1], [-1, 1, 1, -1], [-1, 1, 1, -1], [-1, -1, -1, -1]]]]
    assert layer(torch.ones(1, 1, 5, 6)).shape == (1, 1, 5, 6)


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((3, 8, 8), r"\(3, 8, 8\): add a batch dimension"),
        ((2, 1, 8, 8), r"\(2, 1, 8, 8\)"),
        ((2, 3, 8, 9), r"\(2, 3, 8, 9\)"),
    ],
)
def test_wrong_shapes_are_named_beside_the_expected_one(shape: tuple[int, ...], given: str) -> None:
    with pytest.raises(ValueError, match=r"must have shape \(n, 3, 8, 8\), got " + given):
        ImageInput(3, 8)(torch.rand(shape))


def test_any_size_but_none_is_taken_without_image_size() -> None:
    assert ImageInput(3)(torch.rand(2, 3, 5, 7)).shape == (2, 3, 5, 7)
    with pytest.raises(ValueError, match=r"\(n, 3, H, W\), got \(2, 3, 0, 7\)"):
        ImageInput(3)(torch.rand(2, 3, 0, 7))


def test_integers_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8: divide 8-bit images by 255"):
        ImageInput(3)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_mean_must_come_with_std_and_fit_the_channels() -> None:
    with pytest.raises(ValueError, match="together"):
        ImageInput(3, mean=[0.5])
    with pytest.raises(ValueError, match="together"):
        ImageInput(3, std=[0.5])
    with pytest.raises(ValueError, match="3"):
        ImageInput(3, mean=[0.5, 0.5], std=[1.0, 1.0])
