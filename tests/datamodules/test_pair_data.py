"""Pairs of image and perturbation as training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule, Trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lit_adv.datamodules import PerturbationPairs
from lit_adv.datamodules.pairs import arctanh_way
from lit_adv.models import UNet
from lit_adv.objectives import MeanSquaredError
from lit_adv.tasks import Regression

COUNT = 23
NOTE = {"data": {"name": "digits", "num_classes": 10}, "shrink": 0.1, "box": [0.0, 1.0]}


def columns(first: int, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(first)
    image, x_adv, phi = (torch.rand(count, 1, 8, 8, generator=generator) for _ in range(3))
    number = torch.arange(first, first + count)
    tried = torch.arange(2 * first, 2 * first + 2 * count)
    return {
        "image": image, "x_adv": x_adv, "phi": phi - 0.5, "label": number % 10, "index": number + 100,
        "iterations": number, "queries": number + 1, "tried": tried, "fate": tried % 2,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pairs.json").write_text(json.dumps(NOTE))
    for number, (first, count) in enumerate([(0, 10), (10, 0), (10, 13)]):
        save_file(columns(first, count), tmp_path / f"pool.{number:06d}.safetensors")
    return tmp_path


def whole(data: PerturbationPairs) -> dict[int, tuple[Tensor, Tensor, int]]:
    held = data.val_dataloader()
    assert isinstance(held, DataLoader)
    batches = [*data.train_dataloader(), *held]
    return {
        int(index): (image, target, int(label))
        for batch in batches
        for image, target, label, index in zip(batch.image, batch.target, batch.label, batch.index, strict=True)
    }


def test_every_pair_is_served_once_with_its_scaled_mean(folder: Path) -> None:
    data = PerturbationPairs(folder, val_share=0.3, batch_size=4, target_scale=50.0)
    found = whole(data)
    assert len(data.dataset("train")) == COUNT - int(0.3 * COUNT)
    assert len(data.dataset("val")) == int(0.3 * COUNT)
    expected = [columns(0, 10), columns(10, 13)]
    for part in expected:
        for row, index in enumerate(part["index"].tolist()):
            image, target, label = found.pop(index)
            assert torch.equal(image, part["image"][row])
            torch.testing.assert_close(target, 50 * part["phi"][row])
            assert label == part["label"][row]
    assert not found
    assert (data.name, data.num_classes) == ("pairs of digits", 10)


def test_the_target_of_section_2_2_is_the_way_in_arctanh_space(folder: Path) -> None:
    data = PerturbationPairs(folder, target="image", target_scale=1.0)
    found = whole(data)
    part = columns(0, 10)
    for row, index in enumerate(part["index"].tolist()):
        ways = []
        for x in (part["x_adv"][row].double(), part["image"][row].double()):
            u = 0.9 * (2 * x - 1)
            ways.append(0.5 * torch.log((1 + u) / (1 - u)))
        torch.testing.assert_close(found[index][1].double(), ways[0] - ways[1], rtol=1e-5, atol=1e-6)


def test_without_clipping_the_two_targets_are_the_same() -> None:
    """x' = (tanh(atanh(s (2 x - 1)) + phi) + 1) / 2 without the shrink's own shift, so with the shrink in x' too."""
    x, phi = torch.rand(4, 1, 5, 5).double(), torch.randn(4, 1, 5, 5).double()
    moved = (torch.tanh(torch.atanh(0.9 * (2 * x - 1)) + phi) / 0.9 + 1) / 2
    inside = (moved > 0) & (moved < 1)
    way = arctanh_way(x, moved.clamp(0, 1), 0.1)
    torch.testing.assert_close(way[inside], phi[inside])


def test_black_and_white_pixels_give_finite_targets() -> None:
    black, white = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    for shrink in (1e-6, 0.1):
        assert arctanh_way(black, white, shrink).isfinite().all()
        torch.testing.assert_close(arctanh_way(black, white, shrink), -arctanh_way(white, black, shrink))


def test_what_is_held_out_is_fixed_by_the_seed(folder: Path) -> None:
    def held(**given: Any) -> set[int]:
        return set(PerturbationPairs(folder, val_share=0.3, **given).dataset("val").pairs.index.tolist())

    assert held() == held()
    assert held(seed=1) != held()
    assert held(max_pairs=10) <= set(range(100, 110))


def test_the_order_of_training_is_new_every_epoch_and_the_same_every_run(folder: Path) -> None:
    def orders() -> list[list[int]]:
        loader = PerturbationPairs(folder, batch_size=5).train_dataloader()
        return [[int(i) for batch in loader for i in batch.index] for _ in range(2)]

    first = orders()
    assert first == orders()
    assert first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1])
    plain = PerturbationPairs(folder, batch_size=5, shuffle=False).train_dataloader()
    assert [len(batch.label) for batch in plain] == [5, 5, 5, 5, 1]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_a_regression_is_trained_on_them(folder: Path) -> None:
    data = PerturbationPairs(folder, val_share=0.2, target_scale=1.0)
    task = Regression(UNet(1, widths=(8, 16)), MeanSquaredError())
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(task, data)
    pairs = data.dataset("val").pairs
    with torch.no_grad():
        error = (task.eval()(pairs.image) - pairs.target).double().square().mean()
    assert trainer.callback_metrics["val/mse"].item() == pytest.approx(error.item(), rel=1e-5)
    zero = pairs.target.double().square().mean().item()
    assert trainer.callback_metrics["val/mse_of_zero"].item() == pytest.approx(zero, rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse renames what older versions of it need
def test_a_configuration_builds_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    path = Path(__file__).resolve().parents[2] / "configs" / "data" / "pairs.yaml"
    data = parser.instantiate_classes(parser.parse_args(["--data", str(path), "--data.target", "image"])).data
    assert isinstance(data, PerturbationPairs)
    assert (data.folder, data.target, data.target_scale) == (Path("runs/pairs"), "image", 100.0)


def test_no_pairs_no_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no pairs \(no file pairs.json\): make them by python -m"):
        PerturbationPairs(tmp_path / "none").setup("fit")
    (tmp_path / "pairs.json").write_text(json.dumps(NOTE))
    with pytest.raises(FileNotFoundError, match="holds no pairs yet"):
        PerturbationPairs(tmp_path).setup("fit")


def test_damaged_files_are_told(folder: Path) -> None:
    path = folder / "pool.000000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    save_file({"image": torch.zeros(1)}, folder / "pool.000001.safetensors")
    with pytest.warns(UserWarning, match="damaged and passed over") as told:
        assert len(whole(PerturbationPairs(folder))) == 13
    assert len(told) == 2
    (folder / "pairs.json").write_text("{")
    with pytest.raises(ValueError, match=r"pairs.json is damaged .*: choose another folder, or remove this one"):
        PerturbationPairs(folder).setup("fit")


def test_targets_that_are_no_numbers_are_refused(folder: Path) -> None:
    bad = columns(0, 10)
    bad["phi"][3, 0, 2, 2] = torch.nan
    save_file(bad, folder / "pool.000000.safetensors")
    with pytest.raises(ValueError, match=r"targets in .* hold NaN or inf: make the pairs again"):
        PerturbationPairs(folder).setup("fit")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"val_share": 1.0}, r"val_share must lie in \[0, 1\), got 1.0"),
        ({"target": "x"}, "target must be 'phi' or 'image', got 'x'"),
        ({"target_scale": 0.0}, "target_scale must be > 0, got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_pairs": 0}, "max_pairs must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PerturbationPairs(tmp_path, **given)
