from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_adv.datamodules import TinyImageNet

WNIDS = ("n02", "n01", "n03")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three classes, in lossless files: training image k of class c has the colour (c, k, 0)."""
    root = tmp_path / "tiny"
    for wnid in WNIDS:
        (root / "train" / wnid / "images").mkdir(parents=True)
        for k in range(4):
            colour = (int(wnid[1:]), k, 0)
            Image.new("RGB", (16, 16), colour).save(root / "train" / wnid / "images" / f"{wnid}_{k}.png")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for k, wnid in enumerate(WNIDS):
        Image.new("L", (16, 16), 200 + k).save(root / "val" / "images" / f"val_{k}.png")  # grey, as a few are
        lines.append(f"val_{k}.png\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    return tmp_path


@pytest.mark.parametrize("in_memory", [True, False])
def test_reads_the_layout(small: Path, in_memory: bool) -> None:
    data = TinyImageNet(small, "tiny", size=16, in_memory=in_memory, val_split=3)
    assert (data.num_classes, data.dims, data.name) == (3, (3, 16, 16), "tiny_16px")
    (test,) = data.test_dataloader()
    assert test.label.tolist() == [1, 0, 2]  # classes are numbered by their sorted names
    assert (test.image[:, :, 3, 3] * 255).round().int().tolist() == [[200 + k] * 3 for k in range(3)]
    (train,), (val,) = data.train_dataloader(), data.val_dataloader()
    index, label = torch.cat([train.index, val.index]), torch.cat([train.label, val.label])
    colour = (torch.cat([train.image, val.image])[:, :, 0, 0] * 255).round().long()
    assert index.sort().values.tolist() == list(range(12))
    assert torch.equal(label, index // 4)
    assert torch.equal(colour, torch.stack([index // 4 + 1, index % 4, 0 * index], 1))


def test_resizes(small: Path) -> None:
    (batch,) = TinyImageNet(small, "tiny", size=8).test_dataloader()
    assert batch.image.shape == (3, 3, 8, 8)
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        TinyImageNet(small, "tiny", size=0)


def test_absent_or_incomplete(small: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no usable Tiny ImageNet in .*tiny-imagenet-200.*LIT_ADV_DATA"):
        TinyImageNet(tmp_path).setup("test")
    with pytest.raises(FileNotFoundError, match="no usable Tiny ImageNet"):
        TinyImageNet(tmp_path).setup("fit")
    (small / "tiny" / "wnids.txt").write_text("n01\nn02")
    with pytest.raises(FileNotFoundError, match=r"not those that wnids\.txt names"):
        TinyImageNet(small, "tiny").setup("fit")
    with pytest.raises(FileNotFoundError, match="n03"):
        TinyImageNet(small, "tiny").setup("test")


def test_unreadable_image_is_named(small: Path) -> None:
    (small / "tiny" / "val" / "images" / "val_1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read the image .*val_1\.png"):
        TinyImageNet(small, "tiny", size=16).setup("test")


@pytest.mark.data
@pytest.mark.parametrize(("folder", "size", "classes"), [("tiny_imagenet_subset", 32, 20), ("imagenette64", 64, 10)])
def test_real_folders(image_data: Callable[[str], Path], folder: str, size: int, classes: int) -> None:
    root = image_data(folder)
    data = TinyImageNet(root, folder, size=size, in_memory=False, max_test=40)
    assert data.num_classes == classes
    assert len(data.dataset("train")) == 3200
    lines = (root / folder / "val" / "val_annotations.txt").read_text().splitlines()[:40]
    wnids = sorted((root / folder / "wnids.txt").read_text().split())
    (one, two) = data.test_dataloader()
    images, labels = torch.cat([one.image, two.image]), torch.cat([one.label, two.label])
    assert [wnids[k] for k in labels.tolist()] == [line.split()[1] for line in lines]
    for image, line in list(zip(images, lines, strict=True))[::10]:
        raw = np.asarray(Image.open(root / folder / "val" / "images" / line.split()[0]).convert("RGB"))
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(raw.transpose(2, 0, 1).copy()))
