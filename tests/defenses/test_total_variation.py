"""Total variation against scipy's minimiser and closed forms, its random numbers, and what an attacker sees of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from lit_adv.defenses import TotalVariation
from lit_adv.defenses.total_variation import smoothest
from lit_adv.draws import Draws


class Weighted(nn.Module):
    """A random linear classifier."""

    num_classes = 3

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.to(x.dtype).T


def defended(side: int = 6, channels: int = 1, **arguments: Any) -> TotalVariation:
    return TotalVariation(Weighted(channels * side**2), **arguments).eval()


def blocks(n: int, channels: int = 1, side: int = 8) -> Tensor:
    """Images of flat blocks under noise, as total variation likes them."""
    coarse = torch.rand(n, channels, side // 4, side // 4, dtype=torch.float64)
    fine = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (fine + 0.1 * torch.randn_like(fine)).clamp(0, 1)


def draws(n: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.arange(n), torch.zeros(n, dtype=torch.int64))


def energy(z: np.ndarray, x: np.ndarray, kept: np.ndarray, weight: float) -> tuple[float, np.ndarray]:
    """The smoothed objective of one image (C, H, W) and its gradient, written out."""
    across, down = np.zeros_like(z), np.zeros_like(z)
    across[:, :, :-1] = z[:, :, 1:] - z[:, :, :-1]
    down[:, :-1] = z[:, 1:] - z[:, :-1]
    length = np.sqrt(across**2 + down**2 + 1e-8)
    slope = kept * (z - x) - weight * (across + down) / length
    slope[:, :, 1:] += weight * (across / length)[:, :, :-1]
    slope[:, 1:] += weight * (down / length)[:, :-1]
    return float((kept * (z - x) ** 2).sum() / 2 + weight * length.sum()), slope


def test_the_reference_gradient_agrees_with_differences() -> None:
    rng = np.random.default_rng(0)
    z, x, kept, step = rng.random((2, 3, 4)), rng.random((2, 3, 4)), rng.random((2, 3, 4)), rng.random((2, 3, 4))
    ahead, behind = (energy(z + sign * 1e-6 * step, x, kept, 0.3)[0] for sign in (1, -1))
    assert (ahead - behind) / 2e-6 == pytest.approx(float((energy(z, x, kept, 0.3)[1] * step).sum()), rel=1e-6)


@pytest.mark.parametrize("weight", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_objective_is_within_a_thousandth_of_scipys(channels: int, weight: float) -> None:
    x = blocks(2, channels)
    kept = (torch.rand_like(x) >= 0.5).double()
    found = smoothest(x, kept, weight, 100)
    for n in range(2):
        image, mask = x[n].numpy(), kept[n].numpy()

        def flat(v: np.ndarray, image: Any = image, mask: Any = mask) -> tuple[float, np.ndarray]:
            value, slope = energy(v.reshape(image.shape), image, mask, weight)
            return value, slope.ravel()

        options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-14, "gtol": 1e-9}
        best = minimize(flat, image.ravel(), jac=True, method="L-BFGS-B", options=options).fun
        assert energy(found[n].numpy(), image, mask, weight)[0] <= best * 1.001
        assert best < 0.98 * energy(image, image, mask, weight)[0]


def test_two_values_meet_by_the_weight_or_in_the_middle() -> None:
    """Of a pair (a, b) each moves towards the other by the weight, at most to their mean."""
    x = torch.tensor([[0.2, 0.8], [0.5, 0.6]], dtype=torch.float64).view(2, 1, 1, 2)
    found = smoothest(x, torch.ones_like(x), 0.1, 500)
    expected = torch.tensor([[0.3, 0.7], [0.55, 0.55]], dtype=torch.float64).view(2, 1, 1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_large_weight_leaves_the_mean_of_the_kept_values() -> None:
    x = blocks(3)
    kept = (torch.rand_like(x) >= 0.5).double()
    mean = (x * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)
    torch.testing.assert_close(smoothest(x, kept, 1.0, 2000), mean.expand_as(x), rtol=0, atol=2e-3)


def test_a_dropped_value_says_nothing() -> None:
    x = blocks(2)
    kept = (torch.rand_like(x) >= 0.3).double()
    other = torch.where(kept == 1, x, torch.rand_like(x))
    torch.testing.assert_close(smoothest(x, kept, 0.05, 1500), smoothest(other, kept, 0.05, 1500), rtol=0, atol=5e-3)


def test_without_weight_nor_dropping_images_stay_as_they_are() -> None:
    x = blocks(2)
    for arguments in ({"weight": 0.0, "drop": 0.0}, {"weight": 0.0}, {"iterations": 0}):
        model = defended(8, **arguments)
        assert torch.equal(model.denoise(x), x)
        assert not model.stochastic
    flat = torch.full((1, 1, 8, 8), 0.3, dtype=torch.float64)
    torch.testing.assert_close(defended(8).denoise(flat), flat)


@pytest.mark.parametrize("drop", [0.2, 0.5])
def test_as_many_are_dropped_as_said(drop: float, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []

    def note(x: Tensor, kept: Tensor, *rest: Any) -> Tensor:
        masks.append(kept)
        return x

    monkeypatch.setattr("lit_adv.defenses.total_variation.smoothest", note)
    x = torch.rand(200, 1, 6, 6)
    x[:, :, :3] = 0
    defended(drop=drop).denoise(x)
    defended(drop=drop, keep_zeros=True).denoise(x)
    sigma = (drop * (1 - drop) / masks[0].numel()) ** 0.5
    assert abs(float(masks[0].mean()) - (1 - drop)) < 4 * sigma
    assert (masks[1][:, :, :3] == 1).all()
    assert abs(float(masks[1][:, :, 3:].mean()) - (1 - drop)) < 4 * sigma * 2**0.5


def test_draws_decide_and_rows_do_not_see_one_another() -> None:
    model, x = defended(8), blocks(4)
    given = draws(4)
    whole = model(x, draws=draws(4))
    assert torch.equal(whole, model(x, draws=draws(4)))
    assert not torch.equal(whole, model(x, draws=draws(4, seed=1)))
    assert not torch.equal(model(x), model(x))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order], draws=given[order]), whole[order], rtol=1e-12, atol=1e-12)
    alone = torch.cat([model(x[n : n + 1], draws=given[torch.tensor([n])]) for n in range(4)])
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    assert model(x[:0]).shape == (0, 3)


def test_the_surrogate_has_the_value_and_the_identitys_gradient() -> None:
    model = defended(8)
    x = blocks(3).requires_grad_()
    told = model.surrogate(x, draws=draws(3))
    assert torch.equal(told, model(x, draws=draws(3)))
    (gradient,) = torch.autograd.grad(told[:, 2].sum(), x)
    torch.testing.assert_close(gradient.flatten(1), model.classifier.get_parameter("weight")[2].detach().expand(3, -1))


def test_images_of_any_kind_give_images() -> None:
    model = defended(5, 3)
    for x in (torch.zeros(2, 3, 5, 5), torch.ones(2, 3, 5, 5), torch.rand(2, 3, 5, 5) * 1.4 - 0.2):
        z = model.denoise(x)
        assert z.dtype == torch.float32
        assert z.isfinite().all()
        assert (z >= 0).all()
        assert (z <= 1).all()
    assert defended(1).denoise(torch.rand(2, 1, 1, 1)).shape == (2, 1, 1, 1)
    with torch.inference_mode():
        assert model.half()(torch.rand(2, 3, 5, 5).half()).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop": 1.0}, r"drop must be a probability in \[0, 1\), got 1.0"),
        ({"drop": -0.1}, "drop must be a probability"),
        ({"weight": -1.0}, "weight must be finite and at least 0, got -1.0"),
        ({"weight": float("inf")}, "weight must be finite"),
        ({"iterations": -1}, "iterations must be a whole number, at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        defended(**arguments)
