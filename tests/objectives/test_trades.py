"""TRADES against its formula."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_adv.datamodules import Batch
from lit_adv.defense import Undefended
from lit_adv.objectives import TRADES
from lit_adv.objectives.trades import divergence_per_image
from lit_adv.threat import ThreatModel


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(5, 1, 4, 4), torch.arange(5) % 3, torch.arange(5))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Sum over classes of p (log p - log q), from probabilities."""
    p, q = (torch.exp(z) / torch.exp(z).sum(1, keepdim=True) for z in (p_logits, q_logits))
    return (p * (p.log() - q.log())).sum(1)


def test_divergence_is_the_formula() -> None:
    clean, adv = torch.randn(7, 4).double(), torch.randn(7, 4).double()
    torch.testing.assert_close(divergence_per_image(adv, clean), kl(clean, adv))
    assert (divergence_per_image(clean, clean) == 0).all()


def test_divergence_is_finite_for_confident_answers() -> None:
    sure, other = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])
    torch.testing.assert_close(divergence_per_image(other, sure), torch.tensor([200.0]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_loss_is_clean_cross_entropy_plus_beta_times_divergence(model: nn.Module, batch: Batch, norm: str) -> None:
    objective = TRADES(ThreatModel(norm=norm, eps=0.3), beta=2.5, steps=3, step_size=0.1)  # type: ignore[arg-type]
    torch.manual_seed(1)
    loss, logs = objective(model, batch)

    torch.manual_seed(1)
    reference = copy.deepcopy(model)
    x = batch.image
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(3):
        leaf = x_adv.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(kl(reference(x).detach(), reference(leaf)).sum(), leaf)
        if norm == "linf":
            x_adv = torch.minimum(torch.maximum(x_adv + 0.1 * gradient.sign(), x - 0.3), x + 0.3).clamp(0, 1)
        else:
            moved = x_adv + 0.1 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
            length = (moved - x).flatten(1).norm(dim=1)[:, None, None, None]
            x_adv = (x + (moved - x) * (0.3 / length).clamp_max(1)).clamp(0, 1)
    logits, logits_adv = reference(x), reference(x_adv)
    divergence = kl(logits, logits_adv).mean()
    expected = -logits.log_softmax(1).gather(1, batch.label[:, None]).mean() + 2.5 * divergence
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["divergence"], divergence.detach())

    loss.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_images_stay_in_ball_and_box(model: nn.Module, batch: Batch) -> None:
    threat = ThreatModel(eps=0.05)
    x_adv = TRADES(threat, steps=4, step_size=0.2, sigma=0.5).perturb(model, batch.image)
    assert threat.within(x_adv, batch.image).all()
    assert not torch.equal(x_adv, batch.image)


def test_inner_search_is_in_eval_mode_and_leaves_no_gradient(batch: Batch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    before = copy.deepcopy(model[2].state_dict())
    x_adv = TRADES(ThreatModel(eps=0.1), steps=2, step_size=0.05).perturb(model, batch.image)
    assert model.training
    assert model[2].training
    assert not x_adv.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model[2].state_dict().items())


def test_goes_through_the_surrogate_of_a_defence(model: nn.Module, batch: Batch) -> None:
    class Quantised(Undefended):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * 4).round() / 4)  # no gradient

        def surrogate(self, x: Tensor) -> Tensor:
            return super().forward(x)

    defended = Quantised(model, num_classes=3)
    x_adv = TRADES(ThreatModel(eps=0.3), steps=3, step_size=0.1).perturb(defended, batch.image)
    assert (x_adv - batch.image).abs().amax() > 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"beta": -1.0}, "beta must be at least 0, got -1.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"sigma": -0.1}, "sigma must be at least 0, got -0.1"),
        ({"step_size": 0.0}, "step_size must be positive"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TRADES(ThreatModel(), **arguments)  # type: ignore[arg-type]
