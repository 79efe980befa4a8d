"""DET_PD: scores against the density's own conditionals, p-values against counting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_adv.datamodules import Batch
from lit_adv.detector import scores
from lit_adv.detectors.pixel_defend import Likelihood
from lit_adv.models import DigitsNet, PixelCNN


class Sum(nn.Module):
    """The rounded values' sum as a log-probability."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 4).round().flatten(1).sum(1) + 0 * x.flatten(1).sum(1)


def batch(image: Tensor) -> Batch:
    return Batch(image, torch.zeros(len(image), dtype=torch.int64), torch.arange(len(image)))


def small() -> PixelCNN:
    torch.manual_seed(0)
    return PixelCNN(filters=4, layers=2, kernel=3)


def test_the_score_is_minus_the_log_probability_of_the_8_bit_image() -> None:
    density = small()
    x = torch.rand(3, 1, 5, 5)
    level = (x * 255).round().long()
    logs = density.log_conditionals(level.float() / 255).double()
    expected = -logs.gather(-1, level.unsqueeze(-1)).flatten(1).sum(1)
    torch.testing.assert_close(Likelihood(None, density).score(x).double(), expected.detach(), rtol=1e-5, atol=0)


def test_p_values_are_counted() -> None:
    training = torch.randint(5, (40, 1, 2, 2)).float() / 4
    x = torch.cat([training[:6], torch.rand(10, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)])
    detector = Likelihood(None, Sum(), p_value=True)
    with pytest.raises(ValueError, match="call fit first"):
        detector.score(x)
    detector.fit(batch(training), x, x)
    known, told = Sum()(training), Sum()(x)
    for n in range(len(x)):
        count = sum(float(value) <= float(told[n]) for value in known)
        assert float(detector.score(x)[n]) == pytest.approx(1 - (1 + count) / 41, abs=1e-6)


def test_both_scores_rank_alike() -> None:
    density, training = small(), torch.rand(30, 1, 5, 5)
    x = torch.linspace(0, 1, 12).view(-1, 1, 1, 1) * torch.rand(12, 1, 5, 5)
    plain, ranked = Likelihood(None, density), Likelihood(None, density, p_value=True)
    ranked.fit(batch(training), x, x)
    order = plain.score(x).argsort()
    assert (ranked.score(x)[order].diff() >= 0).all()
    assert torch.equal(scores(plain, x, chunk=5), scores(plain, x, chunk=12))


def test_what_it_knows_lies_in_its_state() -> None:
    density, training, x = small(), torch.rand(7, 1, 4, 4), torch.rand(3, 1, 4, 4)
    fitted, other = Likelihood(None, density, True), Likelihood(None, small(), True)
    fitted.fit(batch(training), x, x)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.score(x), fitted.score(x))
    assert torch.equal(other.known, fitted.known)


@pytest.mark.parametrize("p_value", [False, True])
def test_an_attacker_gets_the_gradient_of_the_log_probability(p_value: bool) -> None:
    density = small()
    detector = Likelihood(None, density, p_value)
    detector.fit(batch(torch.rand(5, 1, 4, 4)), torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4))
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(detector.score(x).sum(), x)
    (expected,) = torch.autograd.grad(-density(x).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().sum() > 0
    with torch.inference_mode():
        torch.testing.assert_close(detector.score(x.detach().clone()), detector.score(x).detach())


def test_networks_stay_frozen_and_in_eval_mode() -> None:
    detector = Likelihood(DigitsNet(filters=(2, 2), hidden=4), small()).train().requires_grad_(True)
    assert not detector.density.training
    assert not any(weight.requires_grad for weight in detector.parameters())


def test_images_of_half_precision_are_scored_in_float32() -> None:
    x = (torch.randint(256, (2, 1, 4, 4)) / 255).bfloat16()
    detector = Likelihood(None, small())
    assert torch.equal(detector.score(x), detector.score(x.float()))


def test_bad_input_is_named() -> None:
    detector = Likelihood(None, small(), p_value=True)
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="training holds no images"):
        detector.fit(batch(x[:0]), x, x)
    with pytest.raises(ValueError, match="NaN"):
        detector.score(x * float("nan"))
    with pytest.raises(ValueError, match="one log-probability per image"):
        Likelihood(None, nn.Flatten()).score(x)
    x[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or inf"):
        detector.score(x)
