"""DDN training against linear models, whose nearest adversarial images are known."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.attacks import DDN, PGD
from lit_adv.datamodules import Batch
from lit_adv.objectives import DDNTraining, Standard
from lit_adv.threat import ThreatModel

SIZE = 36


class Halves(nn.Module):
    """Two classes on either side of the hyperplane w x = w/2, with logits -+ (w x - w/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE))
        self.dropout = nn.Dropout(0.5)

    def gap(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        gap = self.dropout(self.gap(x))
        return torch.stack([-gap, gap], 1)

    def distance(self, x: Tensor) -> Tensor:
        """To the hyperplane."""
        return self.gap(x).abs().detach() / self.weight.detach().norm()


def batch_of(model: Halves, images: int = 12) -> Batch:
    """Images near grey, so that the box never matters, at most 0.4 from the plane."""
    image = 0.5 + 0.05 * torch.randn(images, 1, 6, 6)
    return Batch(image, (model.gap(image) > 0).long(), torch.arange(images))


def unrounded(steps: int = 60) -> DDN:
    return DDN(ThreatModel("l2", "inf"), steps=steps)


def test_images_lie_just_over_the_plane_or_at_the_largest_norm_towards_it() -> None:
    model = Halves().eval()
    batch = batch_of(model, 40)
    distance = model.distance(batch.image)
    norm = float(distance.median())
    x_adv = DDNTraining(unrounded(100), max_norm=norm).perturb(model, batch.image, batch.label)
    far, wrong = distance > 1.02 * norm, model(x_adv).argmax(1) != batch.label
    near = (distance < 0.9 * norm) & (distance > 0.01)  # 100 steps shrink the radius to 0.006
    assert far.any()
    assert near.any()
    assert not wrong[far].any()  # drawn back to where they are right again
    assert wrong[near].all()
    moved = (x_adv - batch.image).flatten(1)
    assert moved.norm(dim=1).max() <= norm * (1 + 1e-5)
    torch.testing.assert_close(moved[far].norm(dim=1), torch.full((int(far.sum()),), norm), rtol=1e-4, atol=0)
    towards = -model.gap(batch.image).sign()[:, None] * F.normalize(model.weight, dim=0)
    assert (F.cosine_similarity(moved, towards.detach()) > 0.97).all()
    assert (moved[near].norm(dim=1) < 1.15 * distance[near]).all()


def test_an_image_already_wrong_stays_as_it_is() -> None:
    model = Halves().eval()
    batch = batch_of(model)
    label = torch.where(torch.arange(12) % 2 == 0, batch.label, 1 - batch.label)
    x_adv = DDNTraining(unrounded()).perturb(model, batch.image, label)
    assert torch.equal(x_adv[1::2], batch.image[1::2])
    assert (x_adv[::2] != batch.image[::2]).flatten(1).any(1).all()


@pytest.mark.parametrize("max_norm", [0.3, 2.4])
def test_an_image_that_nothing_breaks_is_moved_as_far_as_allowed(max_norm: float) -> None:
    linear = nn.Linear(SIZE, 2)
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([1e3, 0.0]))
    model = nn.Sequential(nn.Flatten(), linear)
    x = torch.rand(6, 1, 6, 6)
    x_adv = DDNTraining(unrounded(), max_norm).perturb(model, x, torch.zeros(6, dtype=torch.int64))
    assert x_adv.isfinite().all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    size = (x_adv - x).flatten(1).norm(dim=1)
    assert (size <= max_norm * (1 + 1e-5)).all()
    assert (size > 0.29).all()


def test_loss_is_that_of_the_images_found() -> None:
    model = Halves()
    model.dropout.p = 0.0
    batch = batch_of(model)
    objective = DDNTraining(unrounded(), max_norm=0.1)
    x_adv = objective.perturb(model, batch.image, batch.label)
    loss, logs = objective(model, batch)  # nothing is random in it
    torch.testing.assert_close(loss, F.cross_entropy(model(x_adv), batch.label))
    assert logs["robust_accuracy"].tolist() == (model(x_adv).argmax(1) == batch.label).float().tolist()
    torch.testing.assert_close(logs["distance"], (x_adv - batch.image).flatten(1).norm(dim=1))
    assert loss.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_attack_runs_in_eval_mode_and_loss_in_train_mode() -> None:
    model = Halves()
    modes: list[bool] = []
    model.dropout.register_forward_hook(lambda module, args, output: modes.append(module.training))
    DDNTraining(unrounded(5))(model.train(), batch_of(model))
    assert modes == [False] * 5 + [True]


def test_training_is_clean_before_its_epoch() -> None:
    model = Halves().eval()
    batch = batch_of(model)
    objective = DDNTraining(unrounded(), from_epoch=2)
    clean, _ = Standard()(model, batch)
    for epoch, same in ((0.0, True), (1.99, True), (2.0, False), (5.0, False)):
        objective.epoch = epoch
        loss, logs = objective(model, batch)
        assert torch.equal(loss, clean) == same
        assert logs.keys() == ({"accuracy"} if same else {"robust_accuracy", "distance"})


def test_defaults_are_the_papers() -> None:
    objective = DDNTraining()
    attack = objective.attack
    assert isinstance(attack, DDN)
    assert (attack.steps, attack.gamma, attack.initial, attack.threat.levels) == (100, 0.05, 1.0, 255)
    assert math.isinf(attack.threat.radius)
    assert (objective.max_norm, objective.from_epoch) == (2.4, 0)


def test_it_makes_a_network_more_robust(generator: torch.Generator) -> None:
    """One direction is large and noisy, nine are small and sure: a robust classifier leans on the large one."""
    label = torch.randint(2, (128,), generator=generator)
    side = 2.0 * label - 1
    image = 0.5 + 0.02 * torch.randn(128, 1, 1, 10, generator=generator)
    image[..., 0] += 0.25 * side[:, None, None] * (1 + 0.2 * torch.randn(128, 1, 1, generator=generator))
    image[..., 1:] += 0.03 * side[:, None, None, None]
    batch = Batch(image.clamp(0, 1), label, torch.arange(128))
    start = nn.Linear(10, 2)
    distances = []
    for objective in (Standard(), DDNTraining(unrounded(10), max_norm=0.2)):
        linear = copy.deepcopy(start)
        model = nn.Sequential(nn.Flatten(), linear)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for _ in range(25):
            optimizer.zero_grad()
            objective(model, batch)[0].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        weight = (linear.weight[1] - linear.weight[0]).detach()
        gap = model(batch.image).detach() @ torch.tensor([-1.0, 1.0])
        distances.append(float((side * gap / weight.norm()).mean()))  # of an image to the plane, on its right side
    assert distances[1] > 1.02 * distances[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_norm": 0.0}, "max_norm must be a finite length > 0 in pixel units, got 0.0"),
        ({"max_norm": math.inf}, "max_norm must be a finite length"),
        ({"from_epoch": -1}, "from_epoch must be at least 0, got -1"),
        ({"attack": PGD(ThreatModel("linf", 0.3))}, "attack must be in l2, as max_norm is, got 'linf'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DDNTraining(**arguments)  # type: ignore[arg-type]
