from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lit_adv.datamodules import ImageDataModule

# jsonargparse renames what older versions of it need
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "data"
NO_IMAGES = {"pairs.yaml", "attacked.yaml", "attacked_few.yaml"}  # pairs made by attacks, tested by themselves


@pytest.mark.parametrize("name", sorted({path.name for path in FOLDER.glob("*.yaml")} - NO_IMAGES))
def test_config_makes_a_data_module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ADV_DATA", str(tmp_path))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    arguments = [
        "--data",
        str(FOLDER / name),
        "--data.init_args.batch_size",
        "3",
        "--data.init_args.max_test",
        "9",
    ]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert isinstance(data, ImageDataModule)
    assert (data.batch_size, data.max_test, data.data_dir) == (3, 9, tmp_path)
    assert data.num_classes > 0


def test_transforms_by_class_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data", fail_untyped=False)
    transform = "{class_path: torchvision.transforms.Pad, init_args: {padding: 4}}"
    arguments = ["--data", "Digits", "--data.val_split", "7", "--data.test_transforms", transform]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert next(iter(data.test_dataloader())).image.shape == (32, 1, 16, 16)
    assert len(data.dataset("val")) == 7
