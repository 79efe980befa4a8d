import torch
from sklearn.datasets import load_digits

from lit_adv.datamodules import Digits


def test_images_are_scikit_learns() -> None:
    data, raw = Digits(), load_digits()
    images, labels = torch.from_numpy(raw.images) / 16, torch.from_numpy(raw.target)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert batch.image.shape[1:] == data.dims
            assert torch.equal(batch.image[:, 0], images[batch.index].float())
            assert torch.equal(batch.label, labels[batch.index])


def test_test_set_is_fixed() -> None:
    one, other = Digits(seed=1), Digits(seed=2, val_split=100)
    test = one.dataset("test").index
    assert len(test) == 360
    assert torch.equal(test, other.dataset("test").index)
    assert len(other.dataset("val")) == 100
    parts = [other.dataset(split).index for split in ("train", "val", "test")]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))
    assert not torch.equal(one.dataset("val").index[:50], other.dataset("val").index[:50])


def test_every_class_is_in_every_part() -> None:
    data = Digits()
    for split in ("train", "val", "test"):
        assert set(data.dataset(split).labels.tolist()) == set(range(10))
