"""Training a task, its metrics, and its checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.nets import Noisy
from pytorch_lightning import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lit_adv.attacks import PGD
from lit_adv.datamodules import Batch, Digits
from lit_adv.draws import Draws
from lit_adv.models import DigitsNet
from lit_adv.objectives import TRADES, Madry, Objective, Standard
from lit_adv.tasks import Checkpoint, Classification
from lit_adv.tasks.classification import CLEAN
from lit_adv.tasks.task import MeanPerImage
from lit_adv.threat import ThreatModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "inference_mode": False,
    "log_every_n_steps": 1,
}


@pytest.fixture
def data() -> Digits:
    return Digits(batch_size=50, max_train=280, max_test=130)


@pytest.fixture
def task() -> Classification:
    return Classification(DigitsNet(filters=(4, 8), hidden=16), Standard())


def accuracy(network: nn.Module, batches: Iterator[Batch] | DataLoader[Batch]) -> float:
    right, count = 0, 0
    with torch.no_grad():
        for batch in batches:
            right += int((network(batch.image).argmax(1) == batch.label).sum())
            count += len(batch.label)
    return right / count


def test_mean_counts_every_image_once() -> None:
    metric = MeanPerImage()
    metric.update(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([7, 3, 9]))
    metric.update(torch.tensor([1.0, 1.0]), torch.tensor([7, 2]))  # 7 again, as a sampler repeats it
    assert metric.compute() == 0.5


def test_validation_and_test_metrics_are_those_of_a_plain_loop(task: Classification, data: Digits) -> None:
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    measured = dict(trainer.callback_metrics)
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= measured.keys()
    task.eval()
    assert measured["val/accuracy"].item() == pytest.approx(accuracy(task, data.val_dataloader()))
    (tested,) = trainer.test(task, data, verbose=False)
    assert tested["test/accuracy"] == pytest.approx(accuracy(task.eval(), data.test_dataloader()))


@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_random_defence_has_one_clean_figure_whatever_the_batch_size(inference_mode: bool) -> None:
    found = []
    for batch_size in (130, 50, 7):
        torch.manual_seed(batch_size)
        data = Digits(batch_size=batch_size, max_train=280, max_test=130)
        torch.manual_seed(0)
        task = Classification(Noisy(DigitsNet(filters=(4, 8), hidden=16), 10, 0.5))
        torch.manual_seed(batch_size)
        trainer = Trainer(max_epochs=1, **{**QUIET, "inference_mode": inference_mode})
        found.append({**trainer.validate(task, data, verbose=False)[0], **trainer.test(task, data, verbose=False)[0]})
    assert set(found[0]) == {"val/loss", "val/accuracy", "test/loss", "test/accuracy"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    # by hand: each image's noise follows from its place in the data set, and differs from image to image
    batch = data.dataset("test").__getitems__(range(130))
    model = task.model.eval()
    assert isinstance(model, Noisy)
    loss, noise = 0.0, []
    for image, label, index in zip(*batch, strict=True):
        alone = Draws(0, index[None], torch.zeros(1, dtype=torch.int64), CLEAN)
        noise.append(alone.normal(1, 8, 8)[0])
        with torch.no_grad():
            loss += float(nn.functional.cross_entropy(model.model(image[None] + 0.5 * noise[-1]), label[None])) / 130
    assert found[0]["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert len(torch.stack(noise)[:, 0, 0, 0].unique()) > 120


def test_training_metrics_are_means_over_images_not_over_batches(data: Digits) -> None:
    class Recorded(Standard):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[float, int, float]] = []

        def __call__(self, model: nn.Module, batch: Any) -> Any:
            loss, logs = super().__call__(model, batch)
            self.seen.append((loss.item(), len(batch.label), logs["accuracy"].sum().item()))
            return loss, logs

    objective = Recorded()
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(Classification(DigitsNet(filters=(2, 2), hidden=4), objective), data)
    sizes = {size for _, size, _ in objective.seen}
    assert len(sizes) > 1  # the last batch is smaller
    count = sum(size for _, size, _ in objective.seen)
    loss = sum(loss * size for loss, size, _ in objective.seen) / count
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss)
    assert trainer.callback_metrics["train/accuracy"].item() == pytest.approx(
        sum(r for *_, r in objective.seen) / count
    )


def test_objective_is_told_the_epoch_in_fractions(data: Digits) -> None:
    class Clock(Standard):
        def __init__(self) -> None:
            super().__init__()
            self.epochs: list[float] = []

        def __call__(self, model: nn.Module, batch: Any) -> Any:
            self.epochs.append(self.epoch)
            return super().__call__(model, batch)

    clock = Clock()
    data = Digits(batch_size=60, max_train=240)
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, limit_val_batches=0, **QUIET)
    trainer.fit(Classification(DigitsNet(filters=(2, 2), hidden=4), clock), data)
    assert clock.epochs == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


@pytest.mark.parametrize(
    "objective",
    [
        Standard(),
        Madry(PGD(ThreatModel(eps=0.1), steps=2), clean_share=0.5, attack_label="predicted"),
        TRADES(ThreatModel(eps=0.1), steps=2, step_size=0.05),
    ],
    ids=["standard", "madry", "trades"],
)
def test_bf16_training_moves_every_weight(objective: Objective, data: Digits) -> None:
    task = Classification(DigitsNet(filters=(4, 8), hidden=16), objective)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    trainer = Trainer(max_steps=2, precision="bf16-mixed", enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    assert all(p.dtype == torch.float32 for p in task.parameters())
    assert trainer.callback_metrics["train/loss"].isfinite()
    for key, value in task.model.state_dict().items():
        assert not torch.equal(value, before[key]), key


def test_same_seed_trains_the_same_network(data: Digits) -> None:
    def trained() -> dict[str, torch.Tensor]:
        seed_everything(5, workers=True, verbose=False)
        task = Classification(DigitsNet(filters=(2, 4), hidden=8), Madry(PGD(ThreatModel(eps=0.1), steps=2)))
        trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
        trainer.fit(task, Digits(batch_size=50, max_train=200))
        return dict(task.state_dict())

    first, second = trained(), trained()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_schedule_advances_by_epoch_or_step(data: Digits) -> None:
    rates = []
    for interval in ("epoch", "step"):
        task = Classification(
            DigitsNet(filters=(2, 2), hidden=4),
            Standard(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
            lr_interval=interval,  # type: ignore[arg-type]
        )
        trainer = Trainer(max_steps=3, limit_train_batches=3, enable_checkpointing=False, **QUIET)
        trainer.fit(task, data)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    assert rates == [0.5, 0.125]


def test_plateau_schedule_watches_its_metric(data: Digits) -> None:
    task = Classification(
        DigitsNet(filters=(2, 2), hidden=4),
        Standard(),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode="max", patience=0, threshold=10.0),
        lr_monitor="val/accuracy",
    )
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_frozen_weights_are_not_optimised(task: Classification) -> None:
    task.model.features.requires_grad_(False)  # type: ignore[union-attr]
    optimizer = task.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in task.model.classifier.parameters()}  # type: ignore[union-attr]


def test_training_without_objective_is_refused(data: Digits) -> None:
    trainer = Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="objective is None: training needs one"):
        trainer.fit(Classification(DigitsNet()), data)


def test_checkpoint_of_a_configured_task_is_enough(tmp_path: Path, task: Classification, data: Digits) -> None:
    arguments = {"filters": [4, 8], "hidden": 16}
    model = {"class_path": "lit_adv.models.DigitsNet", "init_args": arguments}
    task.remember({"class_path": "lit_adv.tasks.Classification", "init_args": {"model": model, "lr_interval": "step"}})
    trainer = Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    note = torch.load(tmp_path / "a.ckpt", weights_only=True)["lit_adv"]
    assert note["data"] == "digits"
    assert note["num_classes"] == 10
    assert note["task"] == "lit_adv.tasks.classification.Classification"
    network = Checkpoint(tmp_path / "a.ckpt")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(network(x), task.eval()(x))

    # What is built on it and saved again needs the first file no more.
    network = Checkpoint(tmp_path / "a.ckpt", freeze=False)
    (tmp_path / "a.ckpt").rename(tmp_path / "gone.ckpt")
    second = Classification(network, Standard())
    trainer = Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(second, data)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert torch.equal(Checkpoint(tmp_path / "b.ckpt")(x), second.eval()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's own use of jsonargparse
def test_lightning_loads_the_checkpoint_too(tmp_path: Path, task: Classification, data: Digits) -> None:
    model = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [4, 8], "hidden": 16}}
    task.remember({"class_path": "lit_adv.tasks.Classification", "init_args": {"model": model, "lr_interval": "step"}})
    trainer = Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Classification.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    assert isinstance(loaded, Classification)
    assert loaded.lr_interval == "step"
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), task.eval()(x))
