import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from lit_adv.datamodules import MNIST, FashionMNIST


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """An IDX file, by its definition: two zeros, type 8 (bytes), dimensions, sizes big-endian, bytes."""
    content = path.read_bytes()
    zero, kind, dimensions = struct.unpack(">HBB", content[:4])
    assert (zero, kind) == (0, 8)
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write_idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A Fashion-MNIST of 30 training and 10 test images."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", random.integers(256, size=(count, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


@pytest.mark.data
def test_mnist_equals_its_files(image_data: Callable[[str], Path]) -> None:
    root = image_data("MNIST")
    data = MNIST(root, val_split=5000, batch_size=1000)
    data.prepare_data()
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [55000, 5000, 10000]
    for loader, part in ((data.val_dataloader(), "train"), (data.test_dataloader(), "t10k")):
        images = read_idx(root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte")
        labels = read_idx(root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte")
        for batch in loader:
            expected = images[batch.index.numpy()].astype(np.float32) / np.float32(255)
            assert np.array_equal(batch.image[:, 0].numpy(), expected)
            assert np.array_equal(batch.label.numpy(), labels[batch.index.numpy()])


def test_fashion_mnist_equals_its_files(small: Path) -> None:
    data = FashionMNIST(small, val_split=6)
    data.prepare_data()
    images = read_idx(small / "FashionMNIST" / "raw" / "train-images-idx3-ubyte")
    (batch,) = data.train_dataloader()
    assert batch.image.shape == (24, *data.dims)
    assert torch.equal((batch.image[:, 0] * 255).round().byte(), torch.from_numpy(images[batch.index.numpy()]))
    assert torch.equal(batch.label, batch.index % 10)


def test_absent_data_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\)") as caught:
        MNIST(tmp_path).setup("test")
    assert str(tmp_path) in str(caught.value)
    assert "LIT_ADV_DATA" in str(caught.value)


def test_failed_download_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(datasets.MNIST, "download", fail)
    with pytest.raises(FileNotFoundError, match=r"the download failed .Error downloading train-images") as caught:
        FashionMNIST(tmp_path).prepare_data()
    assert str(tmp_path) in str(caught.value)
    assert "LIT_ADV_DATA" in str(caught.value)


def test_broken_file_is_one_clear_error(small: Path) -> None:
    path = small / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileNotFoundError, match="no usable FashionMNIST"):
        FashionMNIST(small).setup("test")
