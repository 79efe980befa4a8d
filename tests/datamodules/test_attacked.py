"""Images and adversarial counterparts as data: what is served, what is held out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_adv.archive import weights_hash
from lit_adv.attack_set import make_attack_set
from lit_adv.attacks import PGD
from lit_adv.datamodules import AttackedBatch, AttackedImages, Digits
from lit_adv.models import DigitsNet
from lit_adv.threat import ThreatModel

COUNT = 30


def columns(first: int, count: int, attack: int = 0) -> dict[str, Tensor]:
    """Images that their index decides; every third attack fails, half of those without moving the image."""
    number = torch.arange(first, first + count)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1000, 1, 4, 4, generator=generator)[number]
    success = number % 3 != 0
    moved = success | (number % 2 == 0)
    x_adv = torch.where(moved[:, None, None, None], (image + 0.01 * (attack + 1)).clamp(0, 1), image)
    return {
        "image": image, "x_adv": x_adv, "label": number % 10, "target": (number + 1) % 10, "index": number,
        "success": success, "distance": (x_adv - image).flatten(1).norm(dim=1), "queries": number + 5,
        "tried": torch.arange(first, first + count + 2),
    }  # fmt: skip


def folder(place: Path, split: str = "train", attack: int = 0, first: int = 0, **changes: Any) -> str:
    place.mkdir(parents=True)
    data = {"name": "digits", "num_classes": 10, "dims": [1, 4, 4], **changes.pop("data", {})}
    name = ("DDN", "PGD")[attack]
    note = {"attack": {"class_path": f"lit_adv.attacks.x.{name}"}, "model": "abc", "split": split, "data": data}
    (place / "attack_set.json").write_text(json.dumps({**note, **changes}))
    for number, (begin, count) in enumerate([(0, 12), (12, 0), (12, COUNT - 12)]):
        save_file(columns(first + begin, count, attack), place / f"pool.{number:06d}.safetensors")
    return str(place)


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    return [folder(tmp_path / "ddn"), folder(tmp_path / "pgd", attack=1, first=10)]


def check(pairs: AttackedBatch) -> None:
    """Every row is what the shards of its folder say of its index."""
    for row in range(len(pairs.index)):
        expected = columns(int(pairs.index[row]), 1, int(pairs.attack[row]))
        for name in ("image", "x_adv", "label", "target"):
            assert torch.equal(getattr(pairs, name)[row], expected[name][0])
    assert pairs.place.tolist() == list(range(len(pairs.index)))
    assert all(column.dtype == torch.int64 for column in pairs[2:])


def test_successes_of_all_folders_are_served_once(sets: list[str]) -> None:
    data = AttackedImages(sets, val_share=0.25)
    train, val = data.dataset("train").pairs, data.dataset("val").pairs
    check(train)
    check(val)
    served = sorted((int(a), int(i)) for part in (train, val) for a, i in zip(part.attack, part.index, strict=True))
    expected = [(0, i) for i in range(30) if i % 3] + [(1, i) for i in range(10, 40) if i % 3]
    assert served == expected
    assert (data.name, data.num_classes, data.dims, data.model_hash) == ("digits", 10, (1, 4, 4), "abc")
    assert [note["attack"]["class_path"][-3:] for note in data.notes["train"]] == ["DDN", "PGD"]
    assert data.notes["test"] == []


def test_an_image_falls_on_one_side_whatever_folders_it_lies_in(sets: list[str]) -> None:
    data = AttackedImages(sets, val_share=0.25)
    train, val = (set(data.dataset(split).pairs.index.tolist()) for split in ("train", "val"))
    assert not train & val
    sources = {i for i in range(40) if i % 3}
    assert train | val == sources
    assert len(val) == int(0.25 * len(sources))
    twice = {i for i in sources if 10 <= i < 30}
    assert twice & val
    for index in twice & val:
        assert data.dataset("val").pairs.index.tolist().count(index) == 2


def test_what_is_held_out_is_fixed_by_the_seed(sets: list[str]) -> None:
    def held(train: Any = sets, **given: Any) -> set[int]:
        return set(AttackedImages(train, val_share=0.3, **given).dataset("val").pairs.index.tolist())

    assert held() == held() == held(sets[::-1])
    assert held(seed=1) != held()
    # the order in which images are held out is their own: with other folders beside, more or fewer of the same
    alone, beside = held(sets[0]), {index for index in held() if index < 30}
    assert alone <= beside or beside <= alone


def test_failures_are_served_if_asked_for_unless_nothing_moved(sets: list[str]) -> None:
    data = AttackedImages(sets[0], val_share=0.0, keep_failures=True)
    pairs = data.dataset("train").pairs
    check(pairs)
    assert pairs.index.tolist() == [i for i in range(30) if i % 3 or i % 2 == 0]
    assert (pairs.x_adv != pairs.image).flatten(1).any(1).all()
    assert data.val_dataloader() == []


def test_the_first_pairs_of_each_folder(sets: list[str], tmp_path: Path) -> None:
    test = folder(tmp_path / "test", "test", first=100)
    data = AttackedImages(sets, test, val_share=0.0, max_pairs=4, max_test=3)
    pairs = data.dataset("train").pairs
    assert pairs.attack.tolist() == [0] * 4 + [1] * 4
    assert pairs.index.tolist() == [1, 2, 4, 5, 10, 11, 13, 14]
    assert data.dataset("test").pairs.index.tolist() == [100, 101, 103]
    check(data.dataset("test").pairs)


def test_loaders_give_every_pair_and_a_new_order_each_epoch(sets: list[str], tmp_path: Path) -> None:
    def module(**given: Any) -> AttackedImages:
        return AttackedImages(sets, folder_of_tests, batch_size=7, **given)

    folder_of_tests = folder(tmp_path / "test", "test")

    def orders() -> list[list[int]]:
        loader = module().train_dataloader()
        return [[int(place) for batch in loader for place in batch.place] for _ in range(2)]

    first = orders()
    assert first == orders()
    assert first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1]) == list(range(len(module().dataset("train"))))
    plain = [int(place) for batch in module(shuffle=False).train_dataloader() for place in batch.place]
    assert plain == list(range(len(plain)))
    held = module().val_dataloader()
    assert isinstance(held, DataLoader)
    for loader, split in ((held, "val"), (module().test_dataloader(), "test")):
        batches = list(loader)
        assert all(isinstance(batch, AttackedBatch) for batch in batches)
        dataset = module().dataset(split)  # type: ignore[arg-type]
        for joined, column in zip(zip(*batches, strict=True), dataset.pairs, strict=True):
            assert torch.equal(torch.cat(joined), column)
    single = module().dataset("train")[2]
    assert single.image.shape == (1, 4, 4)
    assert int(single.place) == 2


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_a_trainer_takes_it(sets: list[str], tmp_path: Path) -> None:
    class Distance(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def training_step(self, batch: AttackedBatch, number: int) -> Tensor:
            return (self.scale * (batch.x_adv - batch.image) - 1).square().mean()

        def validation_step(self, batch: AttackedBatch, number: int) -> None:
            self.log("val/pairs", float(len(batch.index)), reduce_fx="sum")

        def test_step(self, batch: AttackedBatch, number: int) -> None:
            self.log("test/pairs", float(len(batch.index)), reduce_fx="sum")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = AttackedImages(sets, folder(tmp_path / "test", "test"), batch_size=9)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    task = Distance()
    trainer.fit(task, data)
    assert trainer.callback_metrics["val/pairs"] == len(data.dataset("val"))
    assert task.scale != 0
    trainer.test(task, data, verbose=False)
    assert trainer.callback_metrics["test/pairs"] == 20


def test_it_reads_what_is_made(tmp_path: Path) -> None:
    model, digits = DigitsNet().eval(), Digits(max_train=40)
    attack = PGD(ThreatModel("linf", 0.3), steps=2)
    made = [
        make_attack_set(attack, model, digits, tmp_path / split, split=split, images=40) for split in ("train", "test")
    ]
    data = AttackedImages(tmp_path / "train", tmp_path / "test", val_share=0.0)
    assert [len(data.dataset("train")), len(data.dataset("test"))] == [part.successes for part in made]
    pairs = data.dataset("train").pairs
    with torch.no_grad():
        assert torch.equal(model(pairs.image).argmax(1), pairs.label)
        assert (model(pairs.x_adv).argmax(1) != pairs.label).all()
    assert (data.name, data.num_classes, data.dims) == ("digits", 10, (1, 8, 8))
    assert data.model_hash == weights_hash(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse renames what older versions of it need
@pytest.mark.parametrize("given", ["a", "['a', 'b/c']"])
def test_a_configuration_builds_it(given: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    path = Path(__file__).resolve().parents[2] / "configs" / "data" / "attacked.yaml"
    plain = parser.instantiate_classes(parser.parse_args(["--data", str(path)])).data
    assert isinstance(plain, AttackedImages)
    assert plain.folders == {"train": [Path("runs/attacked/ddn/train")], "test": [Path("runs/attacked/ddn/test")]}
    words = ["--data", str(path), "--data.train", given, "--data.test", "null"]
    data = parser.instantiate_classes(parser.parse_args(words)).data
    assert data.folders == {"train": [Path("a"), Path("b/c")][: len(given.split(","))], "test": []}


def test_test_images_never_serve_in_training(sets: list[str], tmp_path: Path) -> None:
    test = folder(tmp_path / "test", "test")
    with pytest.raises(ValueError, match="test was made of test images and is given as train: test images never"):
        AttackedImages([sets[0], test]).setup("fit")
    with pytest.raises(ValueError, match="ddn was made of train images and is given as test"):
        AttackedImages(sets[0], sets[0]).setup("fit")
    with pytest.raises(ValueError, match="test names no folder: give one made by python"):
        AttackedImages(sets).test_dataloader()
    AttackedImages(sets).setup()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "abd"}, "other was made with another model than .*ddn: read folders of one model only"),
        ({"data": {"name": "mnist"}}, r"another data set \(name\) than"),
        ({"data": {"dims": [1, 8, 8]}}, r"another data set \(dims\) than"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_folders_must_agree(sets: list[str], tmp_path: Path, changes: dict[str, Any], said: str, split: str) -> None:
    other = folder(tmp_path / "other", split, **changes)
    data = AttackedImages([sets[0], other]) if split == "train" else AttackedImages(sets[0], other)
    with pytest.raises(ValueError, match=said):
        data.setup("fit")


def test_no_pairs_no_data(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no file attack_set.json\): make them by python -m lit_adv.attack_set"
    ):
        AttackedImages(tmp_path / "none").setup("fit")
    place = Path(folder(tmp_path / "a"))
    for path in place.glob("pool.*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no adversarial images yet: let python -m"):
        AttackedImages(place).setup("fit")
    save_file({**columns(0, 9), "success": torch.zeros(9, dtype=torch.bool)}, place / "pool.000000.safetensors")
    with pytest.raises(ValueError, match="a holds no pair: DDN broke none of its images"):
        AttackedImages(place).setup("fit")


def test_damaged_files_are_told(sets: list[str]) -> None:
    place = Path(sets[0])
    path = place / "pool.000000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    save_file({"image": torch.zeros(1)}, place / "pool.000001.safetensors")
    with pytest.raises(ValueError, match=r"pool.000000.safetensors is damaged .*: run python -m .* again as before"):
        AttackedImages(place).setup("fit")
    path.unlink()
    with pytest.raises(ValueError, match=r"pool.000000.safetensors is missing, so the adversarial images are not"):
        AttackedImages(place).setup("fit")
    save_file(columns(0, 12), path)
    with pytest.raises(ValueError, match=r"pool.000001.safetensors is damaged \(it lacks columns\)"):
        AttackedImages(place).setup("fit")
    save_file(columns(12, 0), place / "pool.000001.safetensors")
    save_file(columns(12, 9), place / "pool.copy.safetensors")
    with pytest.warns(UserWarning, match=r"pool.copy.safetensors is not named as a pool and passed over: remove it"):
        assert len(AttackedImages(place, val_share=0.0).dataset("train")) == 20
    (place / "pool.copy.safetensors").unlink()
    (place / "attack_set.json").write_text("{")
    with pytest.raises(ValueError, match=r"attack_set.json is damaged .*: choose another folder, or remove this one"):
        AttackedImages(place).setup("fit")
    (place / "attack_set.json").write_text(
        '{"split": "train", "model": "a", "data": {"dims": [1, 1, 1]}, "attack": {}}'
    )
    with pytest.raises(ValueError, match=r"attack_set.json is damaged"):
        AttackedImages(place).setup("fit")
    for lacking in ("name", "num_classes"):
        data: dict[str, Any] = {"name": "a", "num_classes": 10, "dims": [1, 4, 4]}
        data.pop(lacking)
        note = {"split": "train", "model": "a", "data": data, "attack": {"class_path": "a"}}
        (place / "attack_set.json").write_text(json.dumps(note))
        with pytest.raises(ValueError, match=r"attack_set.json is damaged"):
            AttackedImages(place).setup("fit")


def test_pools_are_served_up_to_the_one_that_completes_what_was_wanted(tmp_path: Path) -> None:
    place = Path(folder(tmp_path / "a"))
    served = {1: 8, 8: 8, 9: 20, 100: 20}  # 8 successes in the first pool, none in the second, 12 in the third
    for wanted, count in served.items():
        (place / "wanted.json").write_text(json.dumps({"wanted": wanted}))
        assert len(AttackedImages(place, val_share=0.0).dataset("train")) == count
    (place / "pool.000001.safetensors").unlink()
    (place / "wanted.json").write_text('{"wanted": 8}')
    assert len(AttackedImages(place, val_share=0.0).dataset("train")) == 8  # what lies beyond may be unfinished
    (place / "wanted.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wanted.json is damaged .*: remove it and make the adversarial images again"):
        AttackedImages(place).setup("fit")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"val_share": 1.0}, r"val_share must lie in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_pairs": 0}, "max_pairs must be at least 1, got 0"),
        ({"max_test": 0}, "max_test must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"train": []}, r"train must name folders, each once, got \[\]"),
        ({"test": ["a", "a"]}, "test must name folders, each once"),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AttackedImages(**{"train": "a", **given})
