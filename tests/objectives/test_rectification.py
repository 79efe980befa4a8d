"""Fine-tuning of a rectifier against hand computations, behind detectors whose suspects are known."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.datamodules import Batch
from lit_adv.objectives import Rectification
from lit_adv.objectives.rectification import Masks


class Pairs(NamedTuple):
    image: Tensor
    x_adv: Tensor
    label: Tensor
    place: Tensor


class BrightPixels(nn.Module):
    """A defence that suspects all pixels above ``alpha``, and counts the images it was asked about."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
        )
        self.rectifier = copy.deepcopy(self.classifier)
        self.classifier.requires_grad_(False)
        self.share, self.alpha, self.asked = share, 0.5, 0
        self.modes: list[bool] = []

    def suspects(self, x: Tensor) -> Tensor:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        self.asked += len(x)
        self.modes.append(self.training)
        return x > self.alpha


@pytest.fixture
def batch() -> Pairs:
    return Pairs(torch.rand(4, 1, 6, 6), torch.rand(4, 1, 6, 6), torch.tensor([0, 2, 1, 0]), torch.arange(4))


def seen_by(network: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    network.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    return seen


@pytest.mark.parametrize("duplicates", [1, 3])
def test_where_nothing_is_replaced_it_is_the_loss_of_adversarial_and_clean_images(
    batch: Pairs, duplicates: int
) -> None:
    model = BrightPixels(share=0.0).eval()
    on_adv, on_clean = (model.rectifier(x) for x in (batch.x_adv, batch.image))
    loss, logs = Rectification(duplicates, clean_fraction=0.0)(model, batch)
    torch.testing.assert_close(loss, F.cross_entropy(on_adv, batch.label))
    assert logs.keys() == {"accuracy"}
    loss, logs = Rectification(duplicates, clean_fraction=0.5)(model, batch)
    torch.testing.assert_close(
        loss, (F.cross_entropy(on_adv, batch.label) + F.cross_entropy(on_clean, batch.label)) / 2
    )
    for name, logits in (("accuracy", on_adv), ("clean_accuracy", on_clean)):
        right = (logits.argmax(1) == batch.label).float()
        assert float(logs[name].mean()) == pytest.approx(float(right.mean()))


def test_a_fifth_of_the_images_is_clean_and_all_are_patched(batch: Pairs) -> None:
    model = BrightPixels().eval()
    seen = seen_by(model.rectifier)
    Rectification(duplicates=10, clean_fraction=0.2)(model, batch)
    (x,) = seen
    assert len(x) == 50  # 4 * 10 adversarial, and 10 clean
    sources = {"adv": batch.x_adv, "clean": batch.image}
    counts = {name: [0] * 4 for name in sources}
    for row in x:
        matches = [
            (name, place)
            for name, images in sources.items()
            for place, image in enumerate(images)
            if torch.equal(row[image <= 0.5], image[image <= 0.5])
        ]
        ((name, place),) = matches
        counts[name][place] += 1
        suspect = sources[name][place] > 0.5
        assert (row[suspect] != sources[name][place][suspect]).all()  # share 1: all replaced
    assert counts["adv"] == [10] * 4
    assert sorted(counts["clean"]) == [2, 2, 3, 3]


def test_patches_are_drawn_anew_and_masks_are_found_once(batch: Pairs) -> None:
    model = BrightPixels(share=0.5).train()
    seen = seen_by(model.rectifier)
    objective = Rectification(duplicates=5, clean_fraction=0.2)
    for _ in range(20):
        objective(model, batch)
    assert model.asked == 8  # the adversarial and the clean images, each once
    assert not any(model.modes)
    assert model.training
    assert not torch.equal(seen[0], seen[1])
    assert len({row.numpy().tobytes() for x in seen for row in x[:20]}) == 20 * 20  # no duplicate twice


def test_only_the_rectifier_learns_and_its_statistics_stay(batch: Pairs) -> None:
    model = BrightPixels().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes: list[bool] = []
    model.rectifier[2].register_forward_hook(lambda module, args, output: modes.append(module.training))
    loss, _ = Rectification(duplicates=2)(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert modes == [True]  # dropout is in train mode
    assert model.rectifier[1].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with_gradient = {name for name, value in model.named_parameters() if value.grad is not None}
    assert with_gradient == {f"rectifier.{name}" for name, _ in model.rectifier.named_parameters()}


def test_masks_belong_to_the_image_not_to_its_place(batch: Pairs) -> None:
    model, masks = BrightPixels(), Masks()
    for x in (batch.image, batch.x_adv, batch.image.flip(0), batch.x_adv[1:3]):
        assert torch.equal(masks(model, x), x > 0.5)
    assert model.asked == 8
    model.alpha = 0.9  # another setting, other suspects
    assert torch.equal(masks(model, batch.image), batch.image > 0.9)
    with torch.inference_mode():
        assert torch.equal(masks(model, batch.image.clone()), batch.image > 0.9)
    assert masks(model, batch.image[:0]).shape == (0, 1, 6, 6)
    assert model.asked == 12
    double = batch.image.double()
    assert torch.equal(masks(model, double), double > 0.9)


def test_a_batch_of_one_is_trained_on(batch: Pairs) -> None:
    one = Pairs(*(column[:1] for column in batch))
    loss, logs = Rectification(duplicates=10)(BrightPixels(), one)
    assert loss.isfinite()
    assert (len(logs["accuracy"]), len(logs["clean_accuracy"])) == (10, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"duplicates": 0}, "duplicates must be a whole number of at least 1, got 0"),
        ({"duplicates": 1.5}, "duplicates must be a whole number"),
        ({"clean_fraction": 1.0}, r"clean_fraction must lie in \[0, 1\), got 1.0"),
        ({"clean_fraction": -0.1}, "clean_fraction must lie in"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rectification(**arguments)  # type: ignore[arg-type]


def test_what_cannot_be_rectified_is_refused(batch: Pairs) -> None:
    with pytest.raises(ValueError, match=r"must hold adversarial images 'x_adv'.*AttackedImages"):
        Rectification()(BrightPixels(), Batch(batch.image, batch.label, batch.place))
    with pytest.raises(ValueError, match=r"must be a defence with a rectifier.*Linear has none"):
        Rectification()(nn.Linear(2, 2), batch)
