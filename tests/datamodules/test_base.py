import inspect
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lit_adv.datamodules import Batch, ImageDataModule
from lit_adv.datamodules.base import held_out
from lit_adv.datamodules.sources import PixelImages, Source

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # data in memory have no use for them
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",  # Lightning's own concern
)


class Ramp(ImageDataModule):
    """50 training images whose every pixel is their place, 20 test images of 100 more."""

    name = "ramp"
    num_classes = 10
    dims = (1, 8, 8)
    flip = True

    def source(self, train: bool) -> Source:
        value = torch.arange(50) if train else torch.arange(100, 120)
        pixels = value.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
        return PixelImages(pixels, value % 10)


class Watcher(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[Batch]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: Batch, place: int) -> Tensor:
        self.seen["train"].append(batch)
        return self.weight.sum()

    def validation_step(self, batch: Batch, place: int) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Batch, place: int) -> None:
        self.seen["test"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> pl.Trainer:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **{**silent, **options})


def indices(loader: Any) -> list[int]:
    return [place for batch in loader for place in batch.index.tolist()]


def test_constructor_arguments_and_defaults() -> None:
    parameters = inspect.signature(ImageDataModule.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert list(defaults.items())[:9] == [
        ("data_dir", None),
        ("val_split", 0.2),
        ("num_workers", 0),
        ("normalize", False),
        ("batch_size", 32),
        ("seed", 42),
        ("shuffle", True),
        ("pin_memory", True),
        ("drop_last", False),
    ]
    assert set(list(defaults)[9:]) == {
        *("train_transforms", "val_transforms", "test_transforms", "augment", "max_train", "max_test")
    }


def test_data_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_ADV_DATA", "/somewhere")
    assert str(Ramp().data_dir) == "/somewhere"
    assert str(Ramp("elsewhere").data_dir) == "elsewhere"
    monkeypatch.delenv("LIT_ADV_DATA")
    assert str(Ramp().data_dir) == "data"


@pytest.mark.parametrize(("val_split", "count"), [(0.2, 10), (7, 7), (0, 0), (0.0, 0), (0.99, 49), (49, 49)])
def test_splits_are_disjoint_and_complete(val_split: float, count: int) -> None:
    data = Ramp(val_split=val_split)
    train, val = indices(data.train_dataloader()), indices(data.val_dataloader())
    assert len(val) == count
    assert sorted(train + val) == list(range(50))
    assert indices(data.test_dataloader()) == list(range(20))
    assert indices(data.predict_dataloader()) == list(range(20))


@pytest.mark.parametrize("val_split", [-3, -0.1, 1.0, 1.5, True])
def test_val_split_out_of_range(val_split: float) -> None:
    with pytest.raises(ValueError, match=r"val_split must lie in \[0, 1\) or be a whole number of images, got"):
        Ramp(val_split=val_split)


def test_val_split_must_leave_training_images() -> None:
    with pytest.raises(ValueError, match="val_split must leave images to train on, got 50 of 50"):
        Ramp(val_split=50).setup("fit")
    assert held_out(49, 50) == 49


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("num_workers", -1), ("seed", -1), ("max_train", 0), ("max_test", -5)],
)
def test_whole_numbers_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least \d, got {value}"):
        Ramp(**{name: value})


def test_normalize_is_refused() -> None:
    with pytest.raises(ValueError, match="normalise in the model's first layer"):
        Ramp(normalize=True)


def test_seed_fixes_split_and_order() -> None:
    one, again, other = Ramp(seed=1), Ramp(seed=1), Ramp(seed=2)
    assert indices(one.val_dataloader()) == indices(again.val_dataloader())
    assert indices(one.train_dataloader()) == indices(again.train_dataloader())
    assert set(indices(one.val_dataloader())) != set(indices(other.val_dataloader()))


def test_every_epoch_has_its_own_order() -> None:
    loader, other = Ramp().train_dataloader(), Ramp().train_dataloader()
    first, second = indices(loader), indices(loader)
    assert sorted(first) == sorted(second)
    assert first != second
    other.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert indices(other) == second


def test_without_shuffle_the_order_stays() -> None:
    loader = Ramp(shuffle=False).train_dataloader()
    assert indices(loader) == indices(loader)


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    data = Ramp(augment=True)
    indices(data.train_dataloader())
    indices(data.test_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_images_match_their_index() -> None:
    data = Ramp(batch_size=7)
    for loader, first in (
        (data.train_dataloader(), 0),
        (data.val_dataloader(), 0),
        (data.test_dataloader(), 100),
    ):
        for batch in loader:
            assert isinstance(batch, Batch)
            assert batch.image.dtype == torch.float32
            assert batch.label.dtype == batch.index.dtype == torch.int64
            expected = (batch.index + first).float().div(255)[:, None, None, None].expand(-1, 1, 8, 8)
            assert torch.equal(batch.image, expected)
            assert torch.equal(batch.label, batch.index % 10)


def test_max_train_keeps_the_validation_split() -> None:
    whole, some = Ramp(), Ramp(max_train=5, max_test=3)
    assert indices(whole.val_dataloader()) == indices(some.val_dataloader())
    assert whole.dataset("train").index[:5].tolist() == some.dataset("train").index.tolist()
    assert indices(some.test_dataloader()) == [0, 1, 2]
    assert len(Ramp(max_train=1000).dataset("train")) == 40


def test_drop_last_concerns_training_alone() -> None:
    data = Ramp(batch_size=32, drop_last=True)
    assert len(indices(data.train_dataloader())) == 32
    assert len(indices(data.val_dataloader())) == 10
    assert len(indices(data.test_dataloader())) == 20
    with pytest.raises(ValueError, match="drop_last=True leaves nothing of 40 training images"):
        Ramp(batch_size=64, drop_last=True).train_dataloader()


def test_setup_loads_only_what_the_stage_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    source = Ramp.source
    monkeypatch.setattr(Ramp, "source", lambda self, train: (asked.append(train), source(self, train))[1])
    data = Ramp()
    data.setup("fit")
    data.setup("validate")
    assert asked == [True]
    data.setup("test")
    data.setup()
    assert asked == [True, False]


def test_labels_out_of_range_are_reported() -> None:
    data = Ramp()
    data.num_classes = 9
    with pytest.raises(ValueError, match=r"ramp in .* must have labels 0 to 8, got 50 labels up to 9"):
        data.setup("fit")


def test_workers_give_the_same_batches() -> None:
    alone, helped = Ramp(max_train=12, batch_size=4), Ramp(max_train=12, batch_size=4, num_workers=1)
    for a, b in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_transforms_are_applied_to_single_images() -> None:
    shapes: list[torch.Size] = []

    def invert(image: Tensor) -> Tensor:
        shapes.append(image.shape)
        return 1 - image

    data = Ramp(test_transforms=invert)
    (batch,) = data.test_dataloader()
    assert shapes == [torch.Size([1, 8, 8])] * 20
    assert torch.allclose(batch.image[3], torch.full((1, 8, 8), 1 - 103 / 255))
    (plain,) = data.val_dataloader()
    assert torch.allclose(plain.image[0], plain.index[0] / 255)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            lambda image: (image - 0.5) / 0.2,
            r"train_transforms gave pixels in \[-2\.48, -1\.54\].*normalise in the model",
        ),
        (lambda image: image * float("nan"), "train_transforms gave pixels in .nan"),
        (lambda image: (image * 255).byte(), "train_transforms gave torch.uint8 images"),
        (lambda image: image.flatten(), r"train_transforms gave torch.float32 images of shape \(64,\)"),
        (lambda image: image.no_such_method(), "no_such_method"),
        (lambda image: image.numpy(), "train_transforms failed on an image.*leave out ToTensor"),
    ],
)
def test_unfit_transforms_are_one_clear_error(transform: Any, message: str) -> None:
    with pytest.raises((ValueError, AttributeError), match=message):
        next(iter(Ramp(train_transforms=transform, val_split=0).train_dataloader()))


@pytest.mark.parametrize("shuffle", [True, False])
def test_shards_of_two_processes_cover_everything(shuffle: bool) -> None:
    data = Ramp(shuffle=shuffle, batch_size=4)
    seen: list[int] = []
    for rank in (0, 1):
        loader = Ramp(shuffle=shuffle, batch_size=4).train_dataloader()
        # what a trainer does to a loader on several devices
        if shuffle:
            sampler: Any = DistributedSamplerWrapper(loader.sampler, num_replicas=2, rank=rank, seed=0)
        else:
            sampler = DistributedSampler(data.dataset("train"), num_replicas=2, rank=rank, shuffle=False)
        sampler.set_epoch(3)
        seen += indices(DataLoader(loader.dataset, batch_size=4, sampler=sampler, collate_fn=loader.collate_fn))
    assert len(seen) == 40
    assert set(seen) == set(data.dataset("train").index.tolist())


def test_trainer_augments_training_batches_alone() -> None:
    model, data = Watcher(), Ramp(augment=True, batch_size=10)
    run = trainer(max_epochs=2, num_sanity_val_steps=1)
    run.fit(model, data)
    run.test(model, data, verbose=False)
    assert len(model.seen["train"]) == 8
    for batch in model.seen["train"]:
        value = (batch.index / 255)[:, None, None, None]
        assert bool(((batch.image == 0) | (batch.image == value)).all())
    assert any(bool((batch.image[batch.index > 0] == 0).any()) for batch in model.seen["train"])  # padding came in
    for batch in model.seen["val"]:
        assert torch.equal(batch.image, (batch.index / 255)[:, None, None, None].expand_as(batch.image))
    assert [b.index.tolist() for b in model.seen["test"]] == [list(range(10)), list(range(10, 20))]
    orders = [torch.cat([batch.index for batch in model.seen["train"][k : k + 4]]) for k in (0, 4)]
    assert not torch.equal(*orders)
    assert torch.equal(*(order.sort().values for order in orders))


def test_runs_repeat() -> None:
    first, second = Watcher(), Watcher()
    for model in (first, second):
        torch.rand(3)  # whatever else draws global numbers
        trainer(max_epochs=2, num_sanity_val_steps=0).fit(model, Ramp(augment=True))
    for a, b in zip(first.seen["train"], second.seen["train"], strict=True):
        assert torch.equal(a.image, b.image)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # as was asked for
def test_trainer_without_validation_images() -> None:
    model = Watcher()
    trainer(max_epochs=1).fit(model, Ramp(val_split=0))
    assert model.seen["val"] == []
    assert len(model.seen["train"]) == 2


def test_pickles_after_setup() -> None:
    data = Ramp()
    data.setup()
    assert indices(pickle.loads(pickle.dumps(data)).train_dataloader()) == indices(data.train_dataloader())


def test_predicts_on_the_test_set() -> None:
    class Indices(Watcher):
        def predict_step(self, batch: Batch, place: int) -> Tensor:
            return batch.index

    predicted = trainer().predict(Indices(), Ramp(batch_size=8))
    assert torch.cat(predicted).tolist() == list(range(20))
