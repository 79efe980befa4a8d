"""Training of detectors on pairs made by attacks: metrics against a plain loop, checkpoints, processes, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from lit_adv.attack_set import make_attack_set
from lit_adv.attacks import DDN
from lit_adv.datamodules import AttackedImages, Digits
from lit_adv.datamodules.attacked import AttackedBatch
from lit_adv.detector import NetworkDetector
from lit_adv.detectors import ImageDetector, InputSensitivity, SaliencyDetector, SensitivityDetector
from lit_adv.models import DigitsNet
from lit_adv.objectives import PairDetection
from lit_adv.tasks import Checkpoint, Classification, Detection
from lit_adv.threat import ThreatModel

NET = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [4, 8], "hidden": 32}}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),  # the classifier, on purpose
]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}


class Histograms:
    """A logger's writer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, Tensor]] = []

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        self.given.append((name, values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier's checkpoint, and DDN's images of training and test digits."""
    folder = tmp_path_factory.mktemp("attacked")
    torch.manual_seed(0)
    digits = Digits()
    batch = digits.training_images(400)
    classifier = DigitsNet(filters=(4, 8), hidden=32)
    optimizer = torch.optim.Adam(classifier.parameters(), 0.01)
    for rows in torch.randint(400, (120, 64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(batch.image[rows]), batch.label[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    task = Classification(classifier)
    task.remember({"class_path": "lit_adv.tasks.Classification", "init_args": {"model": NET}})
    trainer = Trainer(logger=False, **QUIET)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(folder / "net.ckpt")
    network = Checkpoint(folder / "net.ckpt")
    for split, images in (("train", 160), ("test", 45)):
        make_attack_set(DDN(steps=15), network, digits, folder / split, split, images)  # type: ignore[arg-type]
    weak = DDN(ThreatModel("l2", "inf"), steps=6, initial=2.0)
    make_attack_set(weak, network, digits, folder / "weak", "test", images=45)
    return folder


def data(folder: Path, test: str = "test", **changes: Any) -> AttackedImages:
    given = {"train": str(folder / "train"), "test": str(folder / test), "batch_size": 32, "val_share": 0.2}
    return AttackedImages(**{**given, **changes})


def recipe(kind: str, folder: Path) -> dict[str, Any]:
    channels = 2 if kind == "SaliencyDetector" else 1
    classifier = {"class_path": "lit_adv.tasks.Checkpoint", "init_args": {"path": str(folder / "net.ckpt")}}
    size = {"num_classes": 2, "in_channels": channels, "filters": [4, 8], "hidden": 16}
    network = {"class_path": "lit_adv.models.DigitsNet", "init_args": size}
    arguments = {"classifier": classifier, "network": network}
    return {"class_path": f"lit_adv.detectors.{kind}", "init_args": arguments}


KINDS: dict[str, type[NetworkDetector]] = {
    "ImageDetector": ImageDetector,
    "SaliencyDetector": SaliencyDetector,
    "SensitivityDetector": SensitivityDetector,
}


def detection(kind: str, folder: Path, rate: float = 0.005) -> Detection:
    torch.manual_seed(1)
    channels = 2 if kind == "SaliencyDetector" else 1
    network = DigitsNet(2, channels, filters=(4, 8), hidden=16)
    detector = KINDS[kind](Checkpoint(folder / "net.ckpt"), network)
    task = Detection(detector, PairDetection(), lambda weights: torch.optim.Adam(weights, rate))
    task.remember({"class_path": "lit_adv.tasks.Detection", "init_args": {"model": recipe(kind, folder)}})
    return task


def by_hand(detector: nn.Module, pairs: AttackedBatch) -> dict[str, float]:
    """Each pair once, image by image; the area by comparing all clean with all adversarial images."""
    detector.eval()
    margins: list[list[float]] = [[], []]
    loss = 0.0
    for row in range(len(pairs.label)):
        for member, x in enumerate((pairs.image, pairs.x_adv)):
            logits = detector(x[row : row + 1]).detach().double()[0]
            margins[member].append(float(logits[1] - logits[0]))
            loss -= float(logits.log_softmax(0)[member])
    clean, adversarial = margins
    wins = sum((a > c) + (a == c) / 2 for a in adversarial for c in clean)
    return {
        "loss": loss / (2 * len(clean)),
        "false_alarms": sum(m > 0 for m in clean) / len(clean),
        "detected": sum(m > 0 for m in adversarial) / len(adversarial),
        "auc": wins / (len(clean) * len(adversarial)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_measures_as_a_plain_loop(folder: Path, tmp_path: Path, kind: str) -> None:
    task, pairs = detection(kind, folder), data(folder)
    before = {name: value.clone() for name, value in task.detector.state_dict().items()}
    trainer = Trainer(max_epochs=3, logger=False, inference_mode=kind == "ImageDetector", **QUIET)
    trainer.fit(task, pairs)
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"train/loss", "train/accuracy"} <= measured.keys()
    for name, value in by_hand(task.detector, pairs.dataset("val").pairs).items():
        assert measured[f"val/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    changed = {name for name, value in task.detector.state_dict().items() if not torch.equal(value, before[name])}
    own = {f"network.{name}" for name, _ in task.detector.network.named_parameters()}
    assert changed == own | ({"scale"} if kind == "SensitivityDetector" else set())
    if kind == "SensitivityDetector":
        assert measured["val/auc"] > 0.85
    trainer.save_checkpoint(tmp_path / "detector.ckpt")
    found = Checkpoint(tmp_path / "detector.ckpt")
    assert isinstance(found, KINDS[kind])
    x = pairs.dataset("test").pairs.x_adv[:5]
    assert torch.equal(found.margin(x), task.detector.eval().margin(x))
    again = Detection(found)  # its classifier is the one attacked still
    (tested,) = Trainer(logger=False, **QUIET).test(again, pairs, verbose=False)
    for name, value in by_hand(found, pairs.dataset("test").pairs).items():
        assert tested[f"test/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_scale_is_that_of_training_pairs_alone(folder: Path) -> None:
    task, pairs = detection("SensitivityDetector", folder), data(folder)
    Trainer(max_epochs=1, logger=False, **QUIET).fit(task, pairs)
    training = pairs.dataset("train").pairs
    assert task.detector.classifier is not None
    leaf = torch.cat([training.image, training.x_adv]).double().requires_grad_()
    logits = task.detector.classifier.double()(leaf)
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum"), leaf)
    expected = float(slope.square().mean().sqrt())
    assert float(task.detector.get_buffer("scale")) == pytest.approx(expected, rel=1e-4)


def test_the_scale_is_fitted_where_the_detector_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before the trainer has moved it, and not anew where a training goes on."""
    task, pairs = detection("SensitivityDetector", folder), data(folder)
    trainer = Trainer(max_epochs=1, logger=False, **QUIET)
    moved: list[bool] = []
    monkeypatch.setattr(type(trainer.strategy), "model_to_device", lambda self: moved.append(True))
    inner = task.detector.calibrate
    seen: list[int] = []

    def calibrate(*given: Any) -> None:
        seen.append(len(moved))
        inner(*given)

    task.detector.calibrate = calibrate  # type: ignore[assignment]
    trainer.fit(task, pairs)
    assert seen == [1]
    trainer.save_checkpoint(folder / "half.ckpt")
    again = detection("SensitivityDetector", folder)
    Trainer(max_epochs=2, logger=False, **QUIET).fit(again, data(folder, max_pairs=60), ckpt_path=folder / "half.ckpt")
    assert torch.equal(again.detector.get_buffer("scale"), task.detector.get_buffer("scale"))


def test_each_set_of_pairs_is_measured_by_itself(folder: Path) -> None:
    """Other pairs stand at the same places: what was kept of the first must not serve for them."""
    task = detection("ImageDetector", folder)
    trainer = Trainer(logger=False, **QUIET)
    for test in ("test", "weak", "test"):
        pairs = data(folder, test)
        (found,) = trainer.test(task, pairs, verbose=False)
        expected = by_hand(task.detector, pairs.dataset("test").pairs)
        assert found["test/loss"] == pytest.approx(expected["loss"], rel=1e-4)
    objective = task.objective
    assert isinstance(objective, PairDetection)
    trainer = Trainer(max_epochs=1, limit_val_batches=0, logger=False, **QUIET)
    trainer.fit(task, data(folder, val_share=0.2))
    first = dict(objective._kept._known)
    trainer = Trainer(max_epochs=1, limit_val_batches=0, logger=False, **QUIET)
    other = data(folder, val_share=0.5, seed=3)
    trainer.fit(task, other)
    training = other.dataset("train").pairs
    for place, views in objective._kept._known.items():
        assert torch.equal(views, torch.stack([training.image[place], training.x_adv[place]]))
    assert not all(torch.equal(views, first[place]) for place, views in objective._kept._known.items())


def test_sensitivities_of_validation_images_are_shown_once(folder: Path) -> None:
    from pytorch_lightning.loggers import Logger

    written = Histograms()

    class Shown(Logger):
        name, version, experiment = "shown", "0", written

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...
        def log_hyperparams(self, *args: Any, **arguments: Any) -> None: ...

    task, pairs = detection("ImageDetector", folder), data(folder)
    Trainer(max_epochs=2, logger=Shown(), **QUIET).fit(task, pairs)
    assert [name for name, _ in written.given] == ["val/log10_sensitivity/clean", "val/log10_sensitivity/adversarial"]
    assert task.detector.classifier is not None
    by_itself = InputSensitivity(task.detector.classifier)
    val = pairs.dataset("val").pairs
    for (_, values), x in zip(written.given, (val.image, val.x_adv), strict=True):
        torch.testing.assert_close(values, by_itself.score(x))
    assert written.given[1][1].median() > written.given[0][1].median() + 1


def test_pairs_of_another_classifier_are_refused(folder: Path) -> None:
    torch.manual_seed(2)
    other = ImageDetector(DigitsNet(filters=(4, 8), hidden=32), DigitsNet(2, filters=(4, 8), hidden=16))
    task, trainer = Detection(other, PairDetection()), Trainer(max_epochs=1, logger=False, **QUIET)
    for run in (trainer.fit, trainer.test):
        with pytest.raises(ValueError, match=r"attacks on another network .* than the classifier that the detector"):
            run(task, data(folder))
    changed = detection("ImageDetector", folder)
    assert changed.detector.classifier is not None
    next(changed.detector.classifier.parameters()).data[0] += 1e-3
    with pytest.raises(ValueError, match="attacks on another network"):
        trainer.fit(changed, data(folder))


def test_what_has_no_network_to_train_is_refused() -> None:
    for model in (DigitsNet(), InputSensitivity(DigitsNet())):
        with pytest.raises(ValueError, match="model must be a detector with a network"):
            Detection(model)


def test_the_epoch_of_least_loss_is_kept() -> None:
    from lit_adv.cli import best_epoch

    keeper = best_epoch([], *Detection.best)
    assert (keeper.monitor, keeper.mode) == ("val/loss", "min")


@pytest.mark.filterwarnings("ignore:.*DistributedSampler")
def test_two_processes_leave_a_checkpoint_that_one_evaluates_to_the_same(folder: Path, tmp_path: Path) -> None:
    task, pairs = detection("SensitivityDetector", folder), data(folder, batch_size=8)
    if len(pairs.dataset("val")) % 2 == 0:  # so that a process sees a pair again
        pairs = data(folder, batch_size=8, max_pairs=len(pairs.dataset("train")) + len(pairs.dataset("val")) - 5)
    assert len(pairs.dataset("val")) % 2 == 1
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    two = Trainer(devices=2, strategy=strategy, max_epochs=1, logger=False, num_sanity_val_steps=0, **QUIET)
    two.fit(task, pairs)
    measured = {name: float(value) for name, value in two.callback_metrics.items()}
    two.save_checkpoint(tmp_path / "two.ckpt")
    alone = Detection(Checkpoint(tmp_path / "two.ckpt"))
    (again,) = Trainer(devices=1, logger=False, **QUIET).validate(alone, pairs, verbose=False)
    assert again.keys() == {f"val/{name}" for name in (*Detection.measures, "auc")}
    for name, value in again.items():
        assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
