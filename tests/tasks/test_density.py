"""Density: its metric against a plain loop, what it learns, and its checkpoint."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from lit_adv.datamodules import Digits
from lit_adv.models import PixelCNN
from lit_adv.objectives import MaximumLikelihood
from lit_adv.tasks import Checkpoint, Density

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
SIZE: dict[str, Any] = {"filters": 6, "layers": 2, "kernel": 3, "levels": 17}  # the digits have as many


@pytest.fixture
def data() -> Digits:
    return Digits(batch_size=10, max_train=160, max_test=30, val_split=31)


def test_bits_are_those_of_a_plain_loop_and_fewer_than_of_uniform_values(data: Digits, tmp_path: Path) -> None:
    model = PixelCNN(**SIZE)
    task = Density(model, MaximumLikelihood(), lambda weights: torch.optim.Adam(weights, 0.02))
    task.remember(
        {
            "class_path": "lit_adv.tasks.Density",
            "init_args": {"model": {"class_path": "lit_adv.models.PixelCNN", "init_args": SIZE}},
        }
    )
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
    trainer.fit(task, data)
    measured = dict(trainer.callback_metrics)
    (tested,) = trainer.test(task, data, verbose=False)
    for split, found in (("val", measured["val/bits_per_dim"]), ("test", tested["test/bits_per_dim"])):
        dataset = data.dataset(split)  # type: ignore[arg-type]
        image = dataset.__getitems__(range(len(dataset))).image
        with torch.no_grad():
            logs = model.eval().log_conditionals(image).double()
        own = logs.gather(-1, (image * 16).round().long().unsqueeze(-1))
        assert float(found) == pytest.approx(float(-own.mean() / math.log(2)), rel=1e-5)
    assert tested["test/bits_per_dim"] < 0.9 * math.log2(17)
    assert measured["train/loss"] > 0

    trainer.save_checkpoint(tmp_path / "density.ckpt")
    again = Checkpoint(tmp_path / "density.ckpt")
    assert isinstance(again, PixelCNN)
    assert torch.equal(again(image), model(image))


def test_the_epoch_of_fewest_bits_is_kept() -> None:
    assert Density.best == ("val/bits_per_dim", "min")


def test_a_network_that_is_no_density_is_refused() -> None:
    objective = MaximumLikelihood()
    batch: Any = type("Images", (), {"image": torch.rand(2, 1, 8, 8), "label": torch.arange(2)})
    with pytest.raises(ValueError, match=r"one log-probability per image, \(2,\), got shape \(2, 64\)"):
        objective(nn.Flatten(), batch)
