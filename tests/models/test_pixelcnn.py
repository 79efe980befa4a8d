"""PixelCNN: it sees what comes before and nothing else, its probabilities sum to 1, and a pass in order is exact."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_adv.models import PixelCNN, PixelDensity
from lit_adv.models.mixtures import bin_log_probabilities, log_probability

OUTPUTS = ("softmax", "logistics")


def density(channels: int = 1, levels: int = 6, output: Any = "softmax", layers: int = 3, seed: int = 0) -> PixelCNN:
    torch.manual_seed(seed)
    model = PixelCNN(channels, 4 * channels, layers, kernel=3, first_kernel=5, levels=levels, output=output).double()
    for weight in model.parameters():  # so that conditionals are far from uniform
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def pictures(n: int, channels: int, height: int, width: int, levels: int) -> Tensor:
    return torch.randint(levels, (n, channels, height, width)).double() / (levels - 1)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_value_depends_on_all_before_it_and_on_none_after(channels: int, output: str) -> None:
    model, height, width = density(channels, output=output), 6, 5
    x = pictures(4, channels, height, width, 6)  # several, for in a single one a ReLU may hide something
    with torch.no_grad():
        before = model.log_conditionals(x)
        assert before.shape == (4, channels, height, width, 6)
        order = [(c, i, j) for i in range(height) for j in range(width) for c in range(channels)]
        for place, (c, i, j) in enumerate(order):
            changed = x.clone()
            changed[:, c, i, j] = (changed[:, c, i, j] + 0.4) % 1
            moved = (model.log_conditionals(changed) - before).abs().amax((0, -1)) > 0
            later = {where for where in order if bool(moved[where])}
            # no blind spot: all that follow within the receptive field, of the whole width here
            assert later == {where for where in order[place + 1 :] if where[1] - i <= 4}


def test_dependence_reaches_as_far_as_the_layers_do() -> None:
    model = density(layers=2)  # half of 5 pixels in the first layer, half of 3 in the second
    x = pictures(1, 1, 9, 9, 6)
    before = model.log_conditionals(x)
    x[0, 0, 0, 4] = 1 - x[0, 0, 0, 4]
    moved = ((model.log_conditionals(x) - before).abs().amax(-1) > 0)[0, 0]
    rows, columns = moved.nonzero().unbind(1)
    assert int(rows.max()) == 3
    assert (int(columns.min()), int(columns.max())) == (1, 7)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("channels", "levels", "height", "width"), [(1, 3, 2, 3), (3, 2, 1, 3), (2, 3, 2, 1)])
def test_probabilities_of_all_images_sum_to_one(
    channels: int, levels: int, height: int, width: int, output: str
) -> None:
    model = density(channels, levels, output)
    values = itertools.product(range(levels), repeat=channels * height * width)
    x = torch.tensor(list(values), dtype=torch.float64).view(-1, channels, height, width) / (levels - 1)
    with torch.no_grad():
        told = model(x)
    assert told.shape == (len(x),)
    assert float(told.exp().sum()) == pytest.approx(1, abs=1e-10)
    assert float(told.std()) > 0.1  # not uniform


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_image_is_as_probable_as_its_values_one_by_one(output: str) -> None:
    model = density(2, 6, output)
    x = pictures(3, 2, 3, 4, 6)
    level = (x * 5).round().long()
    with torch.no_grad():
        logs, told = model.log_conditionals(x), model.log_prob(x)
    for n in range(3):
        total = sum(
            float(logs[n, c, i, j, level[n, c, i, j]]) for c in range(2) for i in range(3) for j in range(4)
        )  # fmt: skip
        assert float(told[n]) == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(x.shape, dtype=torch.float64))


def test_images_are_rounded_and_cut() -> None:
    model = density()
    x = pictures(4, 1, 4, 4, 6)
    off = x + (torch.rand_like(x) - 0.5) * 0.19
    assert torch.equal(model(x), model(off))
    assert torch.equal(model.quantised(torch.tensor([[[[-0.3, 1.4]]]])), torch.tensor([[[[0, 5]]]]))


def test_8_bit_images_come_back_to_the_last_bit() -> None:
    model = PixelCNN(filters=2, layers=1)
    x = torch.arange(256, dtype=torch.uint8).float().div_(255).view(1, 1, 16, 16)
    assert torch.equal(model.image(model.quantised(x)), x)
    assert torch.equal(model.image(model.quantised(x.double()), torch.float64), x.double().mul(255).round() / 255)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pass_in_order_is_that_of_the_plain_loop(channels: int, output: str) -> None:
    model = density(channels, output=output, layers=3)
    x = pictures(3, channels, 4, 6, 6)
    seen: list[list[Tensor]] = [[], []]

    def choose(into: list[Tensor]) -> Any:
        def least_likely_but_one(told: Tensor, level: Tensor) -> Tensor:
            into.append(torch.cat([told, level[:, None].to(told.dtype)], 1))
            return told.argsort(1)[:, 1]

        return least_likely_but_one

    quick = model.revise(x, choose(seen[0]))
    plain = PixelDensity.revise(model, x, choose(seen[1]))
    assert torch.equal(quick, plain)
    assert not torch.equal(quick, x)
    assert len(seen[0]) == len(seen[1]) == channels * 24
    torch.testing.assert_close(torch.stack(seen[0]), torch.stack(seen[1]), rtol=1e-10, atol=1e-11)


def test_rows_do_not_see_one_another() -> None:
    model = density(3)
    x = pictures(4, 3, 4, 4, 6)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-12, atol=1e-12)
    assert model(x[:0]).shape == (0,)
    assert model.revise(x[:0], lambda told, level: level).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_attacker_has_a_gradient(output: str) -> None:
    model = density(output=output)
    x = pictures(2, 1, 4, 4, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).norm(dim=1).min() > 0


def test_it_learns_what_repeats() -> None:
    """Every row is the one above it turned about: one random row in all, half a bit a value."""
    torch.manual_seed(0)
    model = PixelCNN(filters=8, layers=2, kernel=3, first_kernel=3, levels=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(80):
        first = torch.randint(2, (16, 1, 1, 4)).float()
        x = torch.cat([first, 1 - first], 2)
        loss = -model(x).mean() / (8 * math.log(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.48 < float(loss.detach()) < 0.56


@pytest.mark.parametrize("levels", [2, 7, 256])
def test_levels_of_a_logistic_are_differences_of_its_distribution(levels: int) -> None:
    answer = torch.tensor([[0.3, -0.2, 0.1, -0.4, -1.0, -2.0]], dtype=torch.float64)
    logs = bin_log_probabilities(answer, levels)[0]
    share = torch.tensor([0.3, -0.2], dtype=torch.float64).softmax(0)

    def below(edge: float) -> float:
        return sum(
            float(s) / (1 + math.exp(-(edge - mean) / math.exp(scale)))
            for s, mean, scale in zip(share, (0.1, -0.4), (-1.0, -2.0), strict=True)
        )

    for k in range(levels):
        low, high = (2 * k - 1) / (levels - 1) - 1, (2 * k + 1) / (levels - 1) - 1
        expected = (below(high) if k < levels - 1 else 1.0) - (below(low) if k else 0.0)
        assert float(logs[k].exp()) == pytest.approx(expected, rel=1e-7)


def test_far_tails_of_narrow_logistics_stay_finite_in_float32() -> None:
    answer = torch.tensor([0.0, 0.9, -20.0]).requires_grad_()
    logs = log_probability(answer, torch.tensor(-0.5), 256)
    (gradient,) = torch.autograd.grad(logs, answer)
    assert logs.isfinite().all()
    assert gradient.isfinite().all()
    wide = log_probability(torch.tensor([0.0, 0.0, 12.0]), torch.tensor([0.5]), 256)
    assert wide.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"in_channels": 3}, "filters must be divisible by the 3 colours"),
        ({"kernel": 4}, "kernel must be odd and at least 3, got 4"),
        ({"first_kernel": 1}, "first_kernel must be odd and at least 3, got 1"),
        ({"layers": 0}, "layers must hold positive whole numbers only, got 0"),
        ({"output": "normal"}, "output must be 'softmax' or 'logistics', got 'normal'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCNN(**arguments)


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(n, 1, H, W\)"):
        PixelCNN()(torch.rand(2, 3, 4, 4))


def test_half_precision_sums_in_full() -> None:
    torch.manual_seed(0)
    model = PixelCNN(filters=8, layers=2)
    x = torch.rand(2, 1, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, model(x), rtol=0.01, atol=0)
