"""What attacks learn from training images: known by them, kept in a file, learnt once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import images
from pytorch_lightning import Trainer
from torch import Tensor, nn

import lit_adv
from lit_adv.attack import Attack
from lit_adv.attacks import PGD, DifferenceOfMeans
from lit_adv.callbacks import AttackEvaluation
from lit_adv.datamodules import Digits
from lit_adv.estimators import FiniteDifference, PrincipalComponents
from lit_adv.fitted import fit_or_read, read_fit
from lit_adv.objectives import Standard
from lit_adv.protocol import Protocol
from lit_adv.tasks import Classification
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial

X, Y = images(6), torch.arange(6)
BALL = ThreatModel("linf", 0.2)


class Learner:
    """Notes how often it learns."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return {"mean": X.mean(0)}


def test_what_stems_from_the_same_images_labels_and_settings_is_learnt_once(tmp_path: Path) -> None:
    learner, path = Learner(), tmp_path / "there" / "fit.safetensors"
    first = fit_or_read(path, X, Y, "k 3", learner)
    again = fit_or_read(str(path), X.clone(), Y.clone(), "k 3", learner)
    assert learner.times == 1
    assert first.source == again.source == read_fit(path).source
    assert torch.equal(first.tensors["mean"], again.tensors["mean"])
    others = [(X.flip(0), Y, "k 3"), (X, Y.flip(0), "k 3"), (X, None, "k 3"), (X, Y, "k 4"), (X.float(), Y, "k 3")]
    sources = {fit_or_read(path, *other, learner).source for other in others}
    assert learner.times == 6
    assert len(sources | {first.source}) == 6


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    learner = Learner()
    assert fit_or_read(None, X, None, "", learner).source == fit_or_read(None, X, None, "", learner).source
    assert learner.times == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:0], Y[:0], "images to learn from must be finite"),
        (X[0], Y, "images to learn from"),
        ((255 * X).byte(), Y, "torch.uint8"),
        (X / 0, Y, "finite"),
        (X, Y[:3], r"labels must hold one class index per image, shape \(6,\)"),
        (X, Y.float(), "labels must hold one class index"),
    ],
)
def test_bad_images_and_labels_are_named(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_or_read(None, x, y, "", Learner())


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("hello")
    for path in (tmp_path / "none", foreign, tmp_path):
        with pytest.raises(ValueError, match=f"path must be a safetensors file written by fit, got {path}"):
            read_fit(path)


# in an evaluation


def along_components(count: int = 5) -> PGD:
    return PGD(BALL, 1, 0.2, False, estimator=FiniteDifference(PrincipalComponents(count)))


def digits(**arguments: Any) -> Digits:
    return Digits(**({"batch_size": 20, "val_split": 40, "max_train": 200, "max_test": 20} | arguments))


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def tried(attack: Attack, path: Path, **arguments: Any) -> list[dict[str, Any]]:
    """The records of the test images, kept in a folder."""
    torch.manual_seed(0)
    data = digits(**arguments)
    trial = Trial(Protocol(name="a", attack=attack), net(), dirpath=path, training=data.training_images)
    trial.add(data.dataset("test").__getitems__(range(20)))
    trial.close()
    return sorted(trial.rows.values(), key=lambda row: int(row["index"]))


@pytest.mark.parametrize("make", [along_components, lambda: DifferenceOfMeans(BALL)])
def test_an_attack_learns_from_the_training_images_once(make: Any, tmp_path: Path) -> None:
    first, second, by_hand = make(), make(), make()
    assert first.needs_fit
    one = tried(first, tmp_path)
    assert not first.needs_fit
    place = tmp_path / "a" / "fitted.safetensors"
    assert read_fit(place).source == first.fitted_on
    stamp = place.stat().st_mtime_ns
    other = tried(second, tmp_path)
    assert place.stat().st_mtime_ns == stamp
    assert one == other
    training = digits().dataset("train")
    batch = training.__getitems__(range(len(training)))
    by_hand.fit(batch.image, batch.label)
    assert by_hand.fitted_on == first.fitted_on


def test_other_training_images_are_another_run(tmp_path: Path) -> None:
    tried(along_components(), tmp_path)
    tried(along_components(), tmp_path, seed=1)
    assert len([folder for folder in (tmp_path / "a").iterdir() if folder.is_dir()]) == 2


def test_augmentation_and_transforms_are_left_out() -> None:
    data = digits(augment=True, train_transforms=torch.zeros_like)
    assert not data.dataset("train")[0].image.any()
    seen = data.training_images()
    assert len(seen.image) == 200
    assert torch.equal(seen.image, digits().training_images(500).image)
    assert torch.equal(data.training_images(30).label, seen.label[:30])
    assert not data.dataset("train")[0].image.any()


@pytest.mark.parametrize("make", [along_components, lambda: DifferenceOfMeans(BALL)])
def test_plain_tensors_teach_nothing_and_the_remedy_is_named(make: Any) -> None:
    x = torch.rand(10, 1, 8, 8)
    with torch.no_grad():
        model = net()
        y = model(x).argmax(1)
    with pytest.raises(ValueError, match=r"call attack.fit\(images, labels\) with training images"):
        lit_adv.evaluate(model, (x, y), make())
    attack = make()
    attack.fit(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
    assert lit_adv.evaluate(model, (x, y), attack).outcomes[0].records.clean_correct.all()


def test_the_front_door_lets_an_attack_learn_from_a_data_module() -> None:
    attack = along_components()
    lit_adv.evaluate(net(), digits(), attack)
    assert not attack.needs_fit


def test_a_probe_and_a_test_under_a_trainer_learn_too(tmp_path: Path) -> None:
    callback = AttackEvaluation("pca", along_components(), dirpath=tmp_path)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        enable_checkpointing=False, inference_mode=False, callbacks=[callback], log_every_n_steps=1,
    )  # fmt: skip
    task = Classification(net().train(), Standard())
    trainer.fit(task, digits())
    assert "val/robust_accuracy/pca" in trainer.callback_metrics
    assert not callback.protocol.attack.needs_fit
    fresh = AttackEvaluation("pca", along_components(), dirpath=tmp_path)
    trainer.callbacks[:] = [fresh]  # type: ignore[attr-defined]
    trainer.test(task, digits(), verbose=False)
    assert read_fit(tmp_path / "attacks" / "pca" / "fitted.safetensors").source == callback.protocol.attack.fitted_on
