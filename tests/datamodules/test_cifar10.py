import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import cifar

from lit_adv.datamodules import CIFAR10, CIFAR10Jpeg


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def decode(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1).copy())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A CIFAR-10 as JPEG with 30 training and 10 test images."""
    folder = tmp_path / "cifar10_jpeg"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 10)):
        files = [jpeg(random.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        offsets = np.cumsum([0, *map(len, files)]).astype(np.int64)
        labels = (np.arange(count) % 10).astype(np.uint8)
        np.savez(
            folder / f"{part}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offsets=offsets,
            labels=labels,
        )
    return tmp_path


@pytest.mark.data
def test_jpeg_copy_equals_its_files(image_data: Callable[[str], Path]) -> None:
    root = image_data("cifar10_jpeg")
    data = CIFAR10Jpeg(root, val_split=49950, batch_size=10, max_train=20, max_test=20)
    with np.load(root / "cifar10_jpeg" / "test.npz") as arrays:
        content, offsets, labels = arrays["jpeg"].tobytes(), arrays["offsets"], arrays["labels"]
    assert next(iter(data.test_dataloader())).label.tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    for batch in data.test_dataloader():
        for image, label, k in zip(*batch, strict=True):
            assert torch.equal((image * 255).round().byte(), decode(content[offsets[k] : offsets[k + 1]]))
            assert int(label) == labels[k]


def test_small_jpeg_copy(small: Path) -> None:
    data = CIFAR10Jpeg(small, val_split=6)
    with np.load(small / "cifar10_jpeg" / "train.npz") as arrays:
        content, offsets = arrays["jpeg"].tobytes(), arrays["offsets"]
    seen = 0
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            for image, label, k in zip(*batch, strict=True):
                assert image.shape == data.dims
                assert torch.equal((image * 255).round().byte(), decode(content[offsets[k] : offsets[k + 1]]))
                assert int(label) == int(k) % 10
                seen += 1
    assert seen == 30


def test_jpeg_copy_absent_or_broken(tmp_path: Path, small: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no usable CIFAR-10 as JPEG in .*LIT_ADV_DATA"):
        CIFAR10Jpeg(tmp_path / "nowhere").setup("test")
    for content in (b"", b"not an archive"):
        (small / "cifar10_jpeg" / "test.npz").write_bytes(content)
        with pytest.raises(FileNotFoundError, match="no usable CIFAR-10 as JPEG"):
            CIFAR10Jpeg(small).setup("test")


def test_cifar10_equals_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "check_integrity", lambda *arguments: True)  # these files are made up
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = random.integers(256, size=(60, 3072), dtype=np.uint8)  # red, green, blue planes, row by row
    for k, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        content = {"data": rows[10 * k : 10 * k + 10], "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}))
    data = CIFAR10(tmp_path)
    data.prepare_data()
    (train, *_), (test,) = data.train_dataloader(), data.test_dataloader()
    assert torch.equal((test.image * 255).round().byte().flatten(1), torch.from_numpy(rows[50:]))
    assert torch.equal((train.image * 255).round().byte().flatten(1), torch.from_numpy(rows)[train.index])
    assert torch.equal(train.label, train.index % 10)


def test_cifar10_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no usable CIFAR10 in .*prepare_data\(\).*LIT_ADV_DATA"):
        CIFAR10(tmp_path).setup("fit")
