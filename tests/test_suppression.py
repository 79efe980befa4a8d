"""Suspects and their suppression against plain loops, and what equations (12) and (13) promise exactly."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.draws import Draws
from lit_adv.suppression import MODES, MaskMode, suppressed, suspects

ALPHAS = (0.0, 0.05, 0.1, 0.25, 0.35, 0.5, 0.55, 0.7, 0.9, 1.0)
GREY = torch.arange(256) / 255


def by_loop(sensitivity: Tensor, alpha: float, mode: str, joint: bool) -> Tensor:
    """The mask, pixel by pixel, in exact arithmetic."""
    images, channels, height, width = sensitivity.shape
    mask = torch.zeros(sensitivity.shape, dtype=torch.bool)
    for image in range(images):
        for channel in range(channels):
            values: dict[tuple[int, int], Fraction] = {}
            for a in range(height):
                for b in range(width):
                    every = [Fraction(float(sensitivity[image, c, a, b])) for c in range(channels)]
                    values[a, b] = max(every) if joint else every[channel]
            low, high = min(values.values()), max(values.values())
            limit = (Fraction(alpha) if mode == "threshold" else 1 - Fraction(alpha)) * (high - low) + low
            if mode == "quantile":
                order = [*sorted(values.values(), reverse=True), Fraction(-1)]
                limit = order[round(alpha * len(values))]
            for place, value in values.items():
                mask[image, channel, place[0], place[1]] = value > limit
    return mask


def random_sensitivity(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).exp()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_masks_are_those_of_a_plain_loop(mode: MaskMode, joint: bool) -> None:
    sensitivity = random_sensitivity(2, 3, 4, 5)
    for alpha in (0.0, 0.07, 0.3, 0.55, 0.9):
        found = suspects(sensitivity, alpha, mode, joint)
        assert found.dtype == torch.bool
        assert torch.equal(found, by_loop(sensitivity, alpha, mode, joint)), alpha


def test_one_mask_for_all_channels_is_that_of_the_largest() -> None:
    sensitivity = random_sensitivity(3, 3, 5, 4)
    mask = suspects(sensitivity, 0.2, joint=True)
    assert torch.equal(mask[:, 0], mask[:, 2])
    assert torch.equal(mask[:, :1], suspects(sensitivity.amax(1, keepdim=True), 0.2))
    assert not torch.equal(mask, suspects(sensitivity, 0.2))


def test_a_larger_alpha_masks_fewer_by_equation_12_and_more_by_the_others() -> None:
    sensitivity = random_sensitivity(4, 1, 9, 9)
    for mode, sign in (("threshold", -1), ("quantile", 1), ("rate", 1)):
        masks = [suspects(sensitivity, alpha, mode) for alpha in ALPHAS[::sign]]  # type: ignore[arg-type]
        for smaller, larger in pairwise(masks):
            assert not (smaller & ~larger).any(), mode
        assert masks[0].sum() < masks[-1].sum()


def test_the_ends_of_alpha() -> None:
    sensitivity = random_sensitivity(200, 1, 6, 6).float() * torch.logspace(-20, 20, 200)[:, None, None, None]
    least = sensitivity == sensitivity.flatten(1).amin(1)[:, None, None, None]
    assert not suspects(sensitivity, 1.0).any()  # whatever rounding does to g_max - g_min
    assert torch.equal(suspects(sensitivity, 0.0), ~least)
    assert not suspects(sensitivity, 0.0, "rate").any()
    assert torch.equal(suspects(sensitivity, 1.0, "rate"), ~least)
    assert not suspects(sensitivity, 0.0, "quantile").any()
    assert suspects(sensitivity, 1.0, "quantile").all()


def test_a_quantile_is_a_share_of_pixels() -> None:
    mask = suspects(random_sensitivity(3, 2, 28, 28), 0.05, "quantile")
    assert mask.sum((2, 3)).eq(39).all()  # 39.2 of 784


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 1e-30, 7.3])
def test_an_even_sensitivity_leaves_nothing_to_suspect(mode: MaskMode, value: float) -> None:
    for alpha in ALPHAS:
        assert not suspects(torch.full((2, 2, 5, 5), value), alpha, mode).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_leaves_nothing_to_suspect_in_its_image(mode: MaskMode, bad: float) -> None:
    sensitivity = random_sensitivity(3, 1, 4, 4)
    spoilt = sensitivity.clone()
    spoilt[1, 0, 2, 2] = bad
    for alpha in (0.0, 0.4, 1.0):
        mask = suspects(spoilt, alpha, mode)
        assert not mask[1].any()
        assert torch.equal(mask[::2], suspects(sensitivity, alpha, mode)[::2])


@pytest.mark.parametrize("mode", MODES)
def test_only_relations_within_an_image_count(mode: MaskMode) -> None:
    sensitivity = random_sensitivity(5, 2, 6, 6)
    mask = suspects(sensitivity, 0.3, mode)
    scale = 2.0 ** torch.tensor([-80, 3, 0, 40, -7])[:, None, None, None]
    assert torch.equal(suspects(sensitivity * scale, 0.3, mode), mask)
    assert torch.equal(suspects(-sensitivity, 0.3, mode), mask)  # of a signed gradient the size
    assert torch.equal(torch.cat([suspects(row[None], 0.3, mode) for row in sensitivity]), mask)
    assert torch.equal(suspects(sensitivity.flip(0), 0.3, mode).flip(0), mask)


@pytest.mark.parametrize("alpha", [0.1, 0.35, 0.55, 0.8])
def test_the_gradient_of_the_cross_entropy_gives_the_same_mask_as_that_of_the_margin(alpha: float) -> None:
    detector = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    x = torch.rand(16, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    logits = detector(x) + torch.tensor([0.0, 12.0])  # sure of an adversarial image
    adversarial = torch.ones(16, dtype=torch.int64)
    (of_loss,) = torch.autograd.grad(F.cross_entropy(logits, adversarial, reduction="sum"), x, retain_graph=True)
    (of_margin,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), x)
    assert of_loss.abs().max() < 1e-4 * of_margin.abs().max()
    for mode in MODES:
        assert torch.equal(suspects(of_loss.abs(), alpha, mode), suspects(of_margin.abs(), alpha, mode))


def test_no_images_are_no_suspects() -> None:
    nothing = torch.zeros(0, 1, 4, 4)
    for mode in MODES:
        assert suspects(nothing, 0.5, mode).shape == nothing.shape
    assert suppressed(nothing, nothing.bool()).shape == nothing.shape


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
        ({"alpha": 1.01}, r"alpha must lie in \[0, 1\], got 1.01"),
        ({"alpha": float("nan")}, "alpha must lie in"),
        ({"alpha": 0.5, "mode": "top"}, "mode must be one of threshold, quantile, rate, got 'top'"),
        ({"alpha": 0.5, "sensitivity": torch.rand(4, 4)}, r"sensitivity must be floats \(n, C, H, W\)"),
        ({"alpha": 0.5, "sensitivity": torch.ones(1, 1, 4, 4).int()}, "sensitivity must be floats"),
    ],
)
def test_bad_masks_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        suspects(**{"sensitivity": torch.rand(1, 1, 4, 4), **arguments})


def images(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randint(256, shape).float() / 255, torch.rand(shape) < 0.6


def draws(count: int, seed: int = 3) -> Draws:
    return Draws(seed, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def test_a_share_of_0_and_an_empty_mask_change_nothing() -> None:
    x, mask = images(5, 3, 6, 6)
    assert torch.equal(suppressed(x, mask, 0.0, draws(5)), x)
    assert torch.equal(suppressed(x, torch.zeros_like(mask), 1.0, draws(5)), x)


def test_what_is_replaced_is_of_8_bits_and_what_is_not_stays() -> None:
    x, mask = torch.rand(20, 3, 8, 8), torch.rand(20, 3, 8, 8) < 0.5  # on no grid: a replaced value shows
    changed = {}
    for share in (0.5, 1.0):
        made = suppressed(x, mask, share, draws(20))
        changed[share] = made != x
        assert not (changed[share] & ~mask).any()
        assert torch.isin(made[changed[share]], GREY).all()
        assert made.min() >= 0
        assert made.max() <= 1
    assert torch.equal(changed[1.0], mask)
    assert not (changed[0.5] & ~changed[1.0]).any()
    assert changed[0.5].sum() / mask.sum() == pytest.approx(0.5, abs=0.05)  # 1,900 trials: 4 sigma


def test_replaced_values_are_normal_with_the_moments_of_their_channel() -> None:
    scale, centre = torch.tensor([0.02, 0.1]), torch.tensor([0.3, 0.6])
    x = (centre[:, None, None] + scale[:, None, None] * torch.randn(2, 64, 64)).expand(4, 2, 64, 64)
    x = torch.cat([x[:2], x[2:].flip(1)])  # two images the other way round
    made = suppressed(x, torch.ones_like(x).bool(), 1.0, draws(4)).double()
    tolerance = 5 * x.double().std((2, 3)) / 64 + 1e-4
    assert ((made.mean((2, 3)) - x.double().mean((2, 3))).abs() < tolerance).all()
    assert ((made.std((2, 3)) - x.double().std((2, 3))).abs() < tolerance).all()
    sizes = (made - made.mean((2, 3), keepdim=True)).abs() / made.std((2, 3), keepdim=True)
    for sigmas, share in ((1.0, 0.6827), (2.0, 0.9545)):
        assert (sizes < sigmas).double().mean() == pytest.approx(share, abs=0.03)  # the grid of 1/255 is coarse


def test_a_constant_image_is_replaced_by_its_value() -> None:
    x = GREY[:, None, None, None].expand(256, 1, 7, 9).contiguous()
    assert torch.equal(suppressed(x, torch.ones_like(x).bool(), 1.0), x)
    off = torch.full((1, 1, 3, 3), 0.5)  # on no grid: 127.5 / 255
    assert torch.isin(suppressed(off, off.bool(), 1.0), torch.tensor([127, 128]) / 255).all()


def test_an_image_of_0_and_1_is_cut_to_the_box() -> None:
    x = (torch.arange(900) % 2).float().view(1, 1, 30, 30)  # mean and deviation 1/2: 16 % on either side
    made = suppressed(x, torch.ones_like(x).bool(), 1.0, draws(1))
    for end in (0.0, 1.0):
        assert (made == end).double().mean() == pytest.approx(0.159, abs=0.05)


def test_an_image_draws_the_same_in_any_batch() -> None:
    x, mask = images(6, 2, 5, 5)
    whole = suppressed(x, mask, 0.5, draws(6))
    order = torch.randperm(6)
    assert torch.equal(suppressed(x[order], mask[order], 0.5, draws(6)[order]), whole[order])
    alone = [suppressed(x[row : row + 1], mask[row : row + 1], 0.5, draws(6)[torch.tensor([row])]) for row in range(6)]
    assert torch.equal(torch.cat(alone), whole)
    assert not torch.equal(suppressed(x, mask, 0.5, draws(6).later(1)), whole)
    assert not torch.equal(suppressed(x, mask, 0.5, draws(6, seed=4)), whole)
    same = suppressed(x[:1].expand(6, -1, -1, -1), mask[:1].expand(6, -1, -1, -1), 0.5, draws(6))
    assert len({row.numpy().tobytes() for row in same}) == 6  # duplicates of one image differ


def test_without_draws_torch_decides() -> None:
    x, mask = images(3, 1, 6, 6)
    torch.manual_seed(5)
    first, second = suppressed(x, mask), suppressed(x, mask)
    torch.manual_seed(5)
    assert torch.equal(suppressed(x, mask), first)
    assert not torch.equal(first, second)


def test_a_gradient_passes_where_nothing_was_replaced() -> None:
    x, mask = torch.rand(4, 2, 6, 6), torch.rand(4, 2, 6, 6) < 0.5
    leaf = x.clone().requires_grad_()
    made = suppressed(leaf, mask, 0.5, draws(4))
    (slope,) = torch.autograd.grad(made.sum(), leaf)
    assert torch.equal(slope, (made.detach() == x).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_precision_of_images_is_kept(dtype: torch.dtype) -> None:
    x, mask = images(4, 1, 8, 8)
    made = suppressed(x.to(dtype), mask, 1.0, draws(4))
    assert made.dtype == dtype
    assert torch.equal(made[~mask], x.to(dtype)[~mask])
    assert (made.float() - suppressed(x, mask, 1.0, draws(4))).abs().max() <= 2 / 255


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"share": 1.5}, r"share must lie in \[0, 1\], got 1.5"),
        ({"share": -0.5}, "share must lie in"),
        ({"mask": torch.ones(2, 1, 4, 4)}, "mask must be bool in the shape of images"),
        ({"mask": torch.ones(1, 1, 4, 4).bool()}, r"got torch.bool of shape \(1, 1, 4, 4\)"),
    ],
)
def test_bad_suppressions_are_refused(arguments: dict[str, Any], said: str) -> None:
    whole = {"x": torch.rand(2, 1, 4, 4), "mask": torch.ones(2, 1, 4, 4).bool(), **arguments}
    with pytest.raises(ValueError, match=said):
        suppressed(**whole)
