"""Defense: averaging, the default surrogate, straight-through gradients."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Linear, Noisy, Small, images
from torch import Tensor

from lit_adv.defense import Defense, Undefended, straight_through
from lit_adv.draws import Draws


def rows(count: int) -> Draws:
    return Draws(0, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    x = images(2).requires_grad_()
    out = straight_through((x > 0.5).double(), x**2)
    torch.testing.assert_close(out, (x > 0.5).double())
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach())


def test_undefended_is_the_classifier() -> None:
    model, x = Small(), images(3)
    defense = Undefended(model, 4)
    assert torch.equal(defense(x), model(x))
    assert torch.equal(defense.surrogate(x), model(x))
    assert torch.equal(defense.averaged(x, 7), model(x))
    assert (defense.num_classes, defense.stochastic, defense.reject) == (4, False, None)


def test_forward_must_be_defined() -> None:
    class Nothing(Defense):
        num_classes = 2

    with pytest.raises(TypeError, match="Nothing must define forward"):
        Nothing()(images(1))


def test_averaged_is_the_log_of_mean_probabilities_of_different_answers() -> None:
    defense, x = Noisy(Small(), 4, 0.5), images(5)
    answers = [defense(x, rows(5).later(number)) for number in range(6)]
    expected = torch.stack([answer.softmax(-1) for answer in answers]).mean(0).log()
    torch.testing.assert_close(defense.averaged(x, 6, rows(5)).double(), expected, rtol=1e-5, atol=1e-6)
    seen = torch.stack(defense.seen[:6])
    assert len(seen.unique()) == seen.numel()


def test_averaged_survives_probabilities_below_float_range() -> None:
    class Sure(Defense):
        stochastic, num_classes = True, 2

        def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
            return torch.tensor([[0.0, -300.0]]).expand(len(x), 2)

    torch.testing.assert_close(Sure().averaged(images(1), 3, rows(1)), torch.tensor([[0.0, -300.0]]))


def test_averaged_keeps_float64() -> None:
    defense, x = Noisy(Small(), 4), images(2)
    assert defense.averaged(x, 3, rows(2)).dtype == torch.float64


def test_averaged_without_draws_uses_torchs_generator() -> None:
    defense, x = Noisy(Small(), 4), images(2)
    assert not torch.equal(defense.averaged(x, 2), defense.averaged(x, 2))


def test_averaged_of_no_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="answers must be at least 1, got 0"):
        Noisy(Small(), 4).averaged(images(1), 0)


def test_default_surrogate_passes_draws_on() -> None:
    class Plain(Defense):
        stochastic, num_classes = True, 3

        def __init__(self) -> None:
            super().__init__()
            self.model = Linear(3)

        def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
            assert draws is not None
            return self.model(x + draws.normal(*x.shape[1:], dtype=x.dtype))

    defense, x = Plain(), images(2)
    assert torch.equal(defense.surrogate(x, draws=rows(2)), defense(x, draws=rows(2)))
