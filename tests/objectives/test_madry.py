"""Adversarial training against hand computations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.attacks import PGD
from lit_adv.datamodules import Batch
from lit_adv.objectives import Madry, Standard
from lit_adv.threat import ThreatModel


@pytest.fixture
def batch() -> Batch:
    image = 0.3 + 0.4 * torch.rand(8, 1, 4, 4)
    return Batch(image, torch.arange(8) % 3, torch.arange(8))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 3))


def fgsm(eps: float, **kwargs: object) -> PGD:
    return PGD(ThreatModel(eps=eps), steps=1, step_size=eps, random_start=False, **kwargs)  # type: ignore[arg-type]


def signed_step(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """x + eps sign(gradient of the cross-entropy), in eval mode, by hand."""
    frozen = copy.deepcopy(model).eval()
    leaf = x.clone().requires_grad_()
    F.cross_entropy(frozen(leaf), y, reduction="sum").backward()
    assert leaf.grad is not None
    return (x + eps * leaf.grad.sign()).clamp(0, 1)


def test_radius_zero_is_standard_training(model: nn.Module, batch: Batch) -> None:
    losses = []
    for objective in (Standard(), Madry(PGD(ThreatModel(eps=0.0), steps=3))):
        model.eval()  # no dropout: both see the same network
        losses.append(objective(model, batch)[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_trains_on_the_attacked_images(model: nn.Module, batch: Batch) -> None:
    model.eval()
    loss, logs = Madry(fgsm(0.1))(model, batch)
    logits = model(signed_step(model, batch.image, batch.label, 0.1))
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.label))
    assert logs["robust_accuracy"].tolist() == (logits.argmax(1) == batch.label).float().tolist()


def test_half_batches_weigh_clean_and_adversarial_loss_of_the_same_images(model: nn.Module, batch: Batch) -> None:
    model.eval()
    loss, logs = Madry(fgsm(0.2), clean_share=0.25)(model, batch)
    x_adv = signed_step(model, batch.image, batch.label, 0.2)
    clean, adv = (F.cross_entropy(model(x), batch.label) for x in (batch.image, x_adv))
    torch.testing.assert_close(loss, 0.25 * clean + 0.75 * adv)
    assert set(logs) == {"accuracy", "robust_accuracy"}


def test_predicted_label_is_what_a_step_moves_away_from(model: nn.Module, batch: Batch) -> None:
    model.eval()
    predicted = model(batch.image).argmax(1)
    assert (predicted != batch.label).any()
    x_adv = Madry(fgsm(0.1), attack_label="predicted").perturb(model, batch.image, batch.label)
    torch.testing.assert_close(x_adv, signed_step(model, batch.image, predicted, 0.1))


def test_attack_runs_in_eval_mode_and_loss_in_train_mode(model: nn.Module, batch: Batch) -> None:
    modes: list[bool] = []
    model[3].register_forward_hook(lambda module, args, output: modes.append(module.training))
    model.train()
    model[1].eval()  # a submodule someone has frozen stays as it is
    Madry(PGD(ThreatModel(eps=0.1), steps=2))(model, batch)
    assert modes[-1] is True
    assert modes[:-1] == [False] * (len(modes) - 1)
    assert len(modes) == 3
    assert model.training
    assert not model[1].training


def test_no_gradient_flows_through_the_attack(model: nn.Module, batch: Batch) -> None:
    model.train()
    x_adv = Madry(fgsm(0.1)).perturb(model, batch.image, batch.label)
    assert not x_adv.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("epoch", "radius"), [(0.0, 0.0), (0.5, 0.05), (1.0, 0.1), (1.9, 0.19), (2.0, 0.2), (7.0, 0.2)]
)
def test_radius_and_step_grow_linearly(model: nn.Module, batch: Batch, epoch: float, radius: float) -> None:
    objective = Madry(fgsm(0.2), ramp_epochs=2)
    objective.epoch = epoch
    x_adv = objective.perturb(model.eval(), batch.image, batch.label)
    torch.testing.assert_close(x_adv, signed_step(model, batch.image, batch.label, radius))
    assert objective.attack.threat.radius == 0.2
    assert objective.attack.step_size == 0.2  # type: ignore[attr-defined]


def test_fresh_random_starts_come_from_the_global_generator(model: nn.Module, batch: Batch) -> None:
    objective = Madry(PGD(ThreatModel(eps=0.1), steps=1, step_size=0.02))
    model.eval()
    torch.manual_seed(3)
    first, second = (objective.perturb(model, batch.image, batch.label) for _ in range(2))
    torch.manual_seed(3)
    again = objective.perturb(model, batch.image, batch.label)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"clean_share": 1.0}, r"clean_share must lie in \[0, 1\), got 1.0"),
        ({"ramp_epochs": -1}, "ramp_epochs must be at least 0, got -1"),
        ({"attack_label": "own"}, "attack_label must be 'true' or 'predicted', got 'own'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Madry(fgsm(0.1), **arguments)  # type: ignore[arg-type]


def test_ramp_needs_a_radius() -> None:
    with pytest.raises(ValueError, match="ramp_epochs must be 0 where eps is inf"):
        Madry(PGD(ThreatModel(eps="inf"), steps=1, step_size=0.1), ramp_epochs=1)
