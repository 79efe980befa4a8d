"""Regression: its metrics against a plain loop, its checkpoints, and two processes against one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from lit_adv.datamodules import Batch, Digits
from lit_adv.objectives import MeanSquaredError, Standard
from lit_adv.tasks import Checkpoint, Regression

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


class Mirrored(MeanSquaredError):
    """The image's mirror image, of one or two channels."""

    def __init__(self, channels: int = 1) -> None:
        self.channels = channels

    def target(self, batch: Any) -> Tensor:
        return batch.image.flip(-1).repeat(1, self.channels, 1, 1)


@pytest.fixture
def data() -> Digits:
    return Digits(batch_size=50, max_train=280, max_test=130, val_split=101)


def network(channels: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, channels, 3, padding=1))


def by_hand(model: nn.Module, image: Tensor) -> dict[str, float]:
    """Errors of the network, of 0 and of the image against the mirror image."""
    with torch.no_grad():
        mirror, answer = image.flip(-1).double(), model(image).double()
    errors = {"mse": answer - mirror, "mse_of_zero": mirror, "mse_of_input": image.double() - mirror}
    return {name: float((error**2).sum() / error.numel()) for name, error in errors.items()}


def test_metrics_are_those_of_a_plain_loop(data: Digits) -> None:
    task = Regression(network(), Mirrored())
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    measured = dict(trainer.callback_metrics)
    assert {"train/loss", "train/mse_of_zero"} <= measured.keys()
    (tested,) = trainer.test(task, data, verbose=False)
    for stage, split in (("val", "val"), ("test", "test")):
        dataset = data.dataset(split)  # type: ignore[arg-type]
        expected = by_hand(task.eval(), dataset.__getitems__(range(len(dataset))).image)
        found = measured if stage == "val" else tested
        for name, value in expected.items():
            assert float(found[f"{stage}/{name}"]) == pytest.approx(value, rel=1e-5), (stage, name)
    assert tested["test/mse"] < tested["test/mse_of_zero"]  # it has learnt


def test_another_shape_has_no_error_of_the_input(data: Digits) -> None:
    task = Regression(network(2), Mirrored(2))
    trainer = Trainer(max_epochs=1, limit_train_batches=1, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    measured = {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert measured == {"val/mse", "val/mse_of_zero"}


def test_a_checkpoint_holds_the_network_alone(tmp_path: Path, data: Digits) -> None:
    recipe = {
        "class_path": "torch.nn.Conv2d",
        "init_args": {"in_channels": 1, "out_channels": 1, "kernel_size": 3, "padding": 1},
    }
    model = nn.Conv2d(1, 1, 3, padding=1)
    task = Regression(model, Mirrored())
    task.remember({"class_path": "lit_adv.tasks.Regression", "init_args": {"model": recipe}})
    trainer = Trainer(max_steps=3, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(content["state_dict"]) == {"model.weight", "model.bias"}
    assert content["lit_adv"]["task"] == "lit_adv.tasks.regression.Regression"
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(Checkpoint(tmp_path / "a.ckpt", allow=["torch"])(x), task.eval()(x))


def test_the_epoch_of_least_error_is_kept() -> None:
    from lit_adv.cli import best_epoch

    keeper = best_epoch([], *Regression.best)
    assert (keeper.monitor, keeper.mode) == ("val/mse", "min")


def test_other_objectives_are_refused(data: Digits) -> None:
    task = Regression(network(), Standard())
    with pytest.raises(ValueError, match="objective must be a MeanSquaredError, got Standard"):
        task.validation_step(Batch(torch.rand(2, 1, 8, 8), torch.arange(2), torch.arange(2)), 0)


@pytest.mark.filterwarnings("ignore:.*DistributedSampler")
def test_two_processes_leave_a_checkpoint_that_one_evaluates_to_the_same(tmp_path: Path, data: Digits) -> None:
    task = Regression(network(), Mirrored())
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    two = Trainer(devices=2, strategy=strategy, max_epochs=1, enable_checkpointing=False, **QUIET)
    two.fit(task, data)
    measured = {name: float(value) for name, value in two.callback_metrics.items()}
    two.save_checkpoint(tmp_path / "two.ckpt")

    alone = Regression(network(), Mirrored())
    content = torch.load(tmp_path / "two.ckpt", weights_only=True)
    alone.load_state_dict(content["state_dict"])
    one = Trainer(devices=1, enable_checkpointing=False, **QUIET)
    (again,) = one.validate(alone, data, verbose=False)
    assert len(data.dataset("val")) % 2 == 1  # so that a process sees an image again
    for name, value in again.items():
        assert measured[name] == pytest.approx(value, rel=1e-5), name
