"""The rectifier's task behind real detectors: what it measures, what it trains, that it repeats itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_adv.archive import weights_hash
from lit_adv.attacks import DDN
from lit_adv.datamodules import Digits
from lit_adv.datamodules.attacked import AttackedBatch, AttackedDataset
from lit_adv.defenses import GuidedComplementary
from lit_adv.detectors import ImageDetector, SensitivityDetector
from lit_adv.draws import Draws
from lit_adv.models import DigitsNet
from lit_adv.objectives import Rectification as Objective
from lit_adv.suppression import suppressed
from lit_adv.tasks import Rectification
from lit_adv.tasks.classification import CLEAN
from lit_adv.threat import ThreatModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),  # all but the rectifier
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}


class PairData(LightningDataModule):
    """Pairs of the first images to train on, of the last ones to validate and test on."""

    def __init__(self, pairs: AttackedBatch, held: int, batch_size: int = 32, model_hash: str | None = None) -> None:
        super().__init__()
        self.pairs, self.held, self.batch_size, self.model_hash = pairs, held, batch_size, model_hash

    def part(self, training: bool) -> AttackedBatch:
        rows = slice(None, -self.held) if training else slice(-self.held, None)
        part = AttackedBatch(*(column[rows] for column in self.pairs))
        return part._replace(place=torch.arange(len(part.label)))

    def train_dataloader(self) -> DataLoader[AttackedBatch]:
        return AttackedDataset(self.part(True)).loader(self.batch_size, 0)

    def val_dataloader(self) -> DataLoader[AttackedBatch]:
        return AttackedDataset(self.part(False)).loader(self.batch_size, 0)

    test_dataloader = val_dataloader


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, AttackedBatch]:
    """A classifier of digits and its nearest adversarial images."""
    torch.manual_seed(0)
    digits = Digits(val_split=0).training_images(300)
    classifier = DigitsNet(filters=(4, 8), hidden=32)
    optimizer = torch.optim.Adam(classifier.parameters(), 0.01)
    for rows in torch.randint(len(digits.label), (100, 48)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(digits.image[rows]), digits.label[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    classifier.eval().requires_grad_(False)
    right = classifier(digits.image).argmax(1) == digits.label
    image, label, index = (column[right][:200] for column in digits)
    x_adv = DDN(ThreatModel("l2", "inf"), steps=12).perturb(classifier, image, label)
    minus, place = torch.full_like(label, -1), torch.arange(len(label))
    return classifier, AttackedBatch(image, x_adv, label, minus, index, place, torch.zeros_like(label))


def defence_of(classifier: nn.Module, **settings: Any) -> GuidedComplementary:
    """Detectors as they come: where they look does not matter here."""
    torch.manual_seed(1)
    networks = [DigitsNet(num_classes=2, filters=(4, 4), hidden=8) for _ in range(2)]
    return GuidedComplementary(
        classifier,
        ImageDetector(classifier, networks[0]),
        SensitivityDetector(classifier, networks[1], scaling="none"),
        rectifier=copy.deepcopy(classifier).requires_grad_(True),
        answer="rectify",
        **{"alpha": 0.35, **settings},
    )


def by_hand(defence: GuidedComplementary, pairs: AttackedBatch) -> dict[str, float]:
    """Accuracies of one patch of each image."""
    right = {"accuracy": 0, "accuracy_before": 0, "clean_accuracy": 0}
    defence.eval()
    for row in range(len(pairs.label)):
        for kind, x in (("", pairs.x_adv[row : row + 1]), ("clean_", pairs.image[row : row + 1])):
            draws = Draws(0, torch.tensor([row]), torch.tensor([1 if kind else 0]), CLEAN)
            patched = suppressed(x, defence.suspects(x), defence.share, draws)
            assert defence.rectifier is not None
            right[f"{kind}accuracy"] += int(defence.rectifier(patched).argmax() == pairs.label[row])
            if not kind:
                right["accuracy_before"] += int(defence.classifier(patched).argmax() == pairs.label[row])
    return {name: count / len(pairs.label) for name, count in right.items()}


def test_it_learns_measures_and_leaves_all_else_alone(trained: tuple[nn.Module, AttackedBatch]) -> None:
    classifier, pairs = trained
    defence = defence_of(classifier)
    data = PairData(pairs, held=60, batch_size=8, model_hash=weights_hash(classifier))
    before = {name: value.clone() for name, value in defence.state_dict().items()}
    task = Rectification(defence, Objective(duplicates=3), lambda weights: torch.optim.Adam(weights, 0.005))
    modes: list[bool] = []
    assert defence.rectifier is not None
    defence.rectifier.register_forward_hook(lambda module, args, output: modes.append(module.training))
    (untrained,) = Trainer(**QUIET).validate(task, data, verbose=False)
    trainer = Trainer(max_epochs=4, **QUIET)
    trainer.fit(task, data)
    assert any(modes)
    assert not classifier.training
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"train/loss", "train/accuracy", "train/clean_accuracy", "val/loss"} <= measured.keys()
    for name, value in by_hand(defence, data.part(False)).items():
        assert measured[f"val/{name}"] == pytest.approx(value, abs=1e-6), name
    assert measured["val/accuracy"] > measured["val/accuracy_before"]
    assert measured["val/loss"] < 0.8 * untrained["val/loss"]
    assert measured["val/clean_accuracy"] > 0.7
    changed = {name for name, value in defence.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"rectifier.{name}" for name, _ in classifier.named_parameters()}


def test_a_measurement_repeats_itself_for_any_batch_size(trained: tuple[nn.Module, AttackedBatch]) -> None:
    classifier, pairs = trained
    task = Rectification(defence_of(classifier))
    (first,) = Trainer(**QUIET).validate(task, PairData(pairs, held=50), verbose=False)
    (second,) = Trainer(**QUIET).validate(task, PairData(pairs, held=50, batch_size=7), verbose=False)
    (tested,) = Trainer(**QUIET).test(task, PairData(pairs, held=50), verbose=False)
    assert first.keys() == {f"val/{name}" for name in Rectification.measures}
    for name, value in first.items():
        assert second[name] == pytest.approx(value, abs=1e-5)
        assert tested[name.replace("val", "test")] == pytest.approx(value, abs=1e-5)
    assert first["val/accuracy"] == first["val/accuracy_before"]  # the rectifier is the classifier still


def test_its_network_comes_back_from_a_checkpoint(trained: tuple[nn.Module, AttackedBatch], tmp_path: Path) -> None:
    classifier, pairs = trained
    task = Rectification(defence_of(classifier), Objective(duplicates=1), torch.optim.Adam)
    trainer = Trainer(max_epochs=1, limit_train_batches=2, **QUIET)
    trainer.fit(task, PairData(pairs, held=50))
    trainer.save_checkpoint(tmp_path / "rectifier.ckpt")
    torch.manual_seed(4)
    other = Rectification(defence_of(DigitsNet(filters=(4, 8), hidden=32)))
    other.load_state_dict(torch.load(tmp_path / "rectifier.ckpt", weights_only=True)["state_dict"])
    x: Tensor = pairs.x_adv[:9]
    draws = [Draws(0, torch.arange(9), torch.zeros(9, dtype=torch.int64)) for _ in range(2)]
    task.model.eval(), other.model.eval()
    torch.testing.assert_close(other.model(x, draws=draws[0]), task.model(x, draws=draws[1]))


def test_pairs_of_another_classifier_are_refused(trained: tuple[nn.Module, AttackedBatch]) -> None:
    classifier, pairs = trained
    task = Rectification(defence_of(classifier), Objective())
    data = PairData(pairs, held=50, model_hash=weights_hash(DigitsNet(filters=(4, 8), hidden=32)))
    with pytest.raises(ValueError, match="attacks on another network"):
        Trainer(max_epochs=1, **QUIET).fit(task, data)


def test_suspects_are_those_of_the_detectors_that_there_are(trained: tuple[nn.Module, AttackedBatch]) -> None:
    """Other weights are read into the same defence between two measurements."""
    classifier, pairs = trained
    defence, data, trainer = defence_of(classifier), PairData(pairs, held=50), Trainer(**QUIET)
    objective = Objective()
    task = Rectification(defence, objective)
    trainer.validate(task, data, verbose=False)
    objective.masks(defence, pairs.x_adv[:3])
    assert defence.image_detector is not None
    assert defence.sensitivity_detector is not None
    torch.manual_seed(7)
    for detector in (defence.image_detector, defence.sensitivity_detector):
        detector.network.load_state_dict(DigitsNet(num_classes=2, filters=(4, 4), hidden=8).state_dict())
    trainer.validate(task, data, verbose=False)
    x = pairs.x_adv[:3]
    assert torch.equal(objective.masks(defence, x), defence.suspects(x))
    held = data.part(False).x_adv
    assert torch.equal(task.masks(defence, held), defence.suspects(held))


def test_a_rectifier_that_is_the_classifier_is_refused(trained: tuple[nn.Module, AttackedBatch]) -> None:
    classifier, _ = trained
    defence = defence_of(classifier)
    with pytest.raises(ValueError, match="the rectifier shares weights with the classifier, which would be trained"):
        Rectification(defence.variant(rectifier=classifier))
    assert not any(weight.requires_grad for weight in classifier.parameters())


def test_a_model_without_rectifier_is_refused(trained: tuple[nn.Module, AttackedBatch]) -> None:
    with pytest.raises(ValueError, match="must be a defence with a rectifier"):
        Rectification(trained[0])
