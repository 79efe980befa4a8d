import pytest
import torch

from lit_adv.datamodules.dataset import Batch, EpochSampler, ImageDataset, check_images, collate
from lit_adv.datamodules.sources import PixelImages


def source(generator: torch.Generator) -> PixelImages:
    return PixelImages(torch.randint(256, (9, 3, 4, 5), generator=generator, dtype=torch.uint8), torch.arange(9))


@pytest.mark.parametrize("in_memory", [True, False])
def test_gathers_a_batch(generator: torch.Generator, in_memory: bool) -> None:
    images = source(generator)
    dataset = ImageDataset(images, torch.tensor([8, 2, 5, 1]), in_memory=in_memory)
    batch = dataset.__getitems__([3, 0])
    assert batch.index.tolist() == batch.label.tolist() == [1, 8]
    assert torch.equal(batch.image[1], images.pixels[8].float() / 255)
    single = dataset[2]
    assert int(single.index) == 5
    assert single.image.shape == (3, 4, 5)


def test_memory_is_its_own(generator: torch.Generator) -> None:
    images = source(generator)
    dataset = ImageDataset(images, torch.arange(9))
    before = dataset[0].image
    dataset.__getitems__([0]).image.zero_()
    images.pixels.zero_()
    assert torch.equal(dataset[0].image, before)


def test_white_is_one() -> None:
    pixels = torch.tensor([0, 4, 16], dtype=torch.uint8).view(3, 1, 1, 1)
    dataset = ImageDataset(PixelImages(pixels, torch.zeros(3, dtype=torch.int64)), torch.arange(3), white=16)
    assert dataset.__getitems__([0, 1, 2]).image.flatten().tolist() == [0.0, 0.25, 1.0]


def test_collate_takes_batches_and_single_images(generator: torch.Generator) -> None:
    dataset = ImageDataset(source(generator), torch.arange(9))
    whole = dataset.__getitems__([4, 7])
    assert collate(whole) is whole
    for a, b in zip(collate([dataset[4], dataset[7]]), whole, strict=True):
        assert torch.equal(a, b)


def test_empty_data_set(generator: torch.Generator) -> None:
    dataset = ImageDataset(source(generator), torch.arange(0))
    assert len(dataset) == 0
    with pytest.raises(IndexError, match="empty data set"):
        dataset[0]


def test_sampler_depends_on_seed_and_epoch() -> None:
    orders = {(seed, epoch): _order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(30)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert orders[1, 2] == _order(1, 2)


def _order(seed: int, epoch: int) -> list[int]:
    sampler = EpochSampler(30, seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == 30
    return list(sampler)


def test_check_images() -> None:
    check_images(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), "images")
    for wrong in (-1e-6, 1.0001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="images gave pixels in"):
            check_images(torch.tensor([0.5, wrong]).view(1, 1, 1, 2), "images")
    with pytest.raises(ValueError, match=r"torch\.float64"):
        check_images(torch.zeros(1, 1, 2, 2, dtype=torch.float64), "images")


def test_batch_fields() -> None:
    assert Batch._fields == ("image", "label", "index")
