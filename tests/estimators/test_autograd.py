"""Autograd: the gradient of a function, and of a random one in the mean."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Noisy, Small, images
from torch import Tensor

from lit_adv.draws import Draws
from lit_adv.estimators import Autograd
from lit_adv.oracle import QueryOracle


def draws(count: int) -> Draws:
    return Draws(0, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def cubes(x: Tensor) -> Tensor:
    return (x**3).flatten(-3).sum(-1)


@pytest.mark.parametrize("eot", [1, 4])
def test_value_gradient_and_memory_of_a_known_function(eot: int) -> None:
    x = images(5)
    estimator = Autograd(eot)
    memory = estimator.init(x)
    assert memory.shape == (5, 0)
    with torch.no_grad():  # as inside an attack
        value, gradient, after = estimator(cubes, x, memory, draws(5), (0.0, 1.0))
    torch.testing.assert_close(value, cubes(x))
    torch.testing.assert_close(gradient, 3 * x**2)
    assert after is memory
    assert not value.requires_grad
    assert not gradient.requires_grad
    assert not x.requires_grad


@pytest.mark.parametrize("eot", [1, 3])
def test_the_cost_is_what_is_charged(eot: int) -> None:
    x = images(4)
    oracle = QueryOracle(Noisy(Small(), 4), 4)
    estimator = Autograd(eot)
    estimator(lambda z: oracle.scores(z, torch.arange(4))[..., 0], x, estimator.init(x), draws(4), (0.0, 1.0))
    assert oracle.queries.tolist() == [eot] * 4 == [estimator.cost(x.shape[1:])] * 4


def test_a_random_gradient_is_averaged_over_fresh_draws() -> None:
    """x times noise, squared: the mean gradient is 2 x (1 + noise variance); its error falls with the draws."""
    x = images(4)

    class Multiplied(Noisy):
        def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
            assert draws is not None
            noisy = x * (1 + 0.5 * draws.normal(*x.shape[1:], dtype=x.dtype))
            total = (noisy**2).flatten(1).sum(1)
            return torch.stack([total, -total], 1)

    errors = []
    for eot in (4, 400):
        oracle = QueryOracle(Multiplied(Small(), 2), 4, chunk=64)
        _, gradient, _ = Autograd(eot)(
            lambda z, o=oracle: o.scores(z, torch.arange(4))[..., 0], x, x[:, :0, 0, 0], draws(4), (0.0, 1.0)
        )
        errors.append(float((gradient - 2.5 * x).norm()))
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 0.15 * float((2.5 * x).norm())


def test_rows_do_not_see_one_another() -> None:
    x, model = images(6), Small()
    whole = Autograd()(lambda z: model(z)[..., 1], x, x[:, :0, 0, 0], draws(6), (0.0, 1.0))[1]
    for i in range(6):
        row = slice(i, i + 1)
        alone = Autograd()(lambda z: model(z)[..., 1], x[row], x[row, :0, 0, 0], draws(1), (0.0, 1.0))[1]
        torch.testing.assert_close(alone, whole[row], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("eot", [0, -3])
def test_no_draws_are_refused(eot: int) -> None:
    with pytest.raises(ValueError, match=f"eot must be at least 1 draw, got {eot}"):
        Autograd(eot)
