import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_adv.datamodules import ImageNet


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes in folders: image k of class c has the colour (c, k, 0); wider than high."""
    for part, count in (("train", 4), ("val", 5)):
        for c in range(3):
            folder = tmp_path / "imagenet" / part / f"n0{c}"
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (40, 20), (c, k, 0)).save(folder / f"{k}.png")
    return tmp_path


def test_reads_a_tree(tree: Path) -> None:
    data = ImageNet(tree, size=8, resize=10, num_classes=3, val_split=2)
    assert (data.dims, data.name) == ((3, 8, 8), "imagenet_8px")
    (train,), (test,) = data.train_dataloader(), data.test_dataloader()
    assert train.image.shape == (10, 3, 8, 8)
    for batch, per_class in ((train, 4), (test, 5)):
        colour = (batch.image[:, :, 4, 4] * 255).round().long()
        assert torch.equal(batch.label, batch.index // per_class)
        assert torch.equal(colour[:, 0], batch.label)
        assert torch.equal(colour[:, 1], batch.index % per_class)
    assert test.index.sort().values.tolist() == list(range(15))


def test_the_first_test_images_are_of_several_classes(tree: Path) -> None:
    (some,) = ImageNet(tree, size=8, resize=8, num_classes=3, max_test=6).test_dataloader()
    assert len(set(some.label.tolist())) > 1


def test_crops_the_centre(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.paste((0, 255, 0), (12, 2, 28, 18))  # green where a crop of 16 in the middle falls
    (tmp_path / "few").mkdir()
    picture.save(tmp_path / "few" / "a.png")
    (tmp_path / "few" / "labels.csv").write_text("file,imagenet_index\na.png,999\n")
    (batch,) = ImageNet(tmp_path, "few", size=16, resize=20).test_dataloader()
    assert torch.equal(batch.image[0].mean((1, 2)), torch.tensor([0.0, 1.0, 0.0]))
    assert batch.label.tolist() == [999]


def test_wrong_arguments(tree: Path) -> None:
    with pytest.raises(ValueError, match="size must be at least 1 and at most resize=256, got 300"):
        ImageNet(size=300)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        ImageNet(num_classes=0)
    with pytest.raises(ValueError, match=r"num_classes must be the number of folders in .*, 3, got 1000"):
        ImageNet(tree).setup("fit")


def test_absent_or_unfit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no usable ImageNet in .*LIT_ADV_DATA"):
        ImageNet(tmp_path).setup("test")
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "labels.csv").write_text("file,label\na.png,3\n")
    with pytest.raises(ValueError, match=r"labels\.csv must have columns file and imagenet_index"):
        ImageNet(tmp_path, "few").setup("test")
    with pytest.raises(ValueError, match="it is a test set: it cannot be trained on"):
        ImageNet(tmp_path, "few").setup("fit")


@pytest.mark.data
def test_samples(image_data: Callable[[str], Path]) -> None:
    root = image_data("imagenet_samples")
    data = ImageNet(root, "imagenet_samples", max_test=8)
    with (root / "imagenet_samples" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert data.num_classes == 1000
    (batch,) = data.test_dataloader()
    assert batch.label.tolist() == [int(row["imagenet_index"]) for row in rows[:8]]
    assert batch.image.shape == (8, 3, 224, 224)
    # at a shorter side of 256 nothing is resized, so the crop holds the file's own pixels
    picture = Image.open(root / "imagenet_samples" / rows[0]["file"]).convert("RGB")
    left, top = round((picture.width - 224) / 2), round((picture.height - 224) / 2)
    expected = torch.tensor(list(picture.crop((left, top, left + 224, top + 224)).tobytes())).view(224, 224, 3)
    assert torch.equal((batch.image[0] * 255).round().long(), expected.permute(2, 0, 1))
