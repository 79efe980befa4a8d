import itertools

import torch
from torch import Tensor

from lit_adv.datamodules.augmentation import crop_and_flip

PADDING = 2


def variants(image: Tensor) -> list[Tensor]:
    """Every crop of one padded image, plain and mirrored, cut out one by one."""
    channels, height, width = image.shape
    canvas = torch.zeros(channels, height + 2 * PADDING, width + 2 * PADDING)
    canvas[:, PADDING:-PADDING, PADDING:-PADDING] = image
    corners = itertools.product(range(2 * PADDING + 1), repeat=2)
    crops = [canvas[:, top : top + height, left : left + width] for top, left in corners]
    return crops + [crop.flip(2) for crop in crops]


def which(image: Tensor, results: Tensor) -> list[int]:
    options = torch.stack(variants(image)).flatten(1)
    match = (results.flatten(1)[:, None] == options).all(-1)
    assert bool((match.sum(1) == 1).all())
    return match.int().argmax(1).tolist()


def test_results_are_crops_of_the_padded_image(generator: torch.Generator) -> None:
    image = torch.rand(3, 5, 7, generator=generator)
    n = 5000
    results = crop_and_flip(image.expand(n, -1, -1, -1), torch.arange(n), 0, 0, PADDING, flip=True)
    counts = torch.tensor(which(image, results)).bincount(minlength=50).float()
    # chi-square with 49 degrees of freedom: mean 49, standard deviation 10
    assert float(((counts - n / 50) ** 2 / (n / 50)).sum()) < 110
    plain = crop_and_flip(image.expand(200, -1, -1, -1), torch.arange(200), 0, 0, PADDING, flip=False)
    assert max(which(image, plain)) < 25


def test_an_image_does_not_depend_on_its_batch(generator: torch.Generator) -> None:
    images, index = torch.rand(16, 1, 6, 6, generator=generator), torch.arange(100, 116)
    whole = crop_and_flip(images, index, 3, 5, PADDING, flip=True)
    order = torch.randperm(16, generator=generator)
    assert torch.equal(crop_and_flip(images[order], index[order], 3, 5, PADDING, flip=True), whole[order])
    assert torch.equal(crop_and_flip(images[4:5], index[4:5], 3, 5, PADDING, flip=True), whole[4:5])


def test_seed_and_epoch_matter(generator: torch.Generator) -> None:
    images, index = torch.rand(16, 1, 6, 6, generator=generator), torch.arange(16)
    one, *others = (crop_and_flip(images, index, s, e, PADDING, True) for s, e in ((0, 0), (0, 1), (1, 0)))
    assert all(not torch.equal(one, other) for other in others)


def test_no_padding_no_change(generator: torch.Generator) -> None:
    images = torch.rand(4, 3, 6, 5, generator=generator)
    assert torch.equal(crop_and_flip(images, torch.arange(4), 0, 0, 0, flip=False), images)
