"""Pairs for NAttack's regression network: resumed and shared runs, and what each pair says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_adv.attacks import NAttack
from lit_adv.datamodules import Digits
from lit_adv.datamodules.pairs import read_pairs
from lit_adv.pairs import Fate, Made, make_pairs
from lit_adv.threat import ThreatModel

IMAGES, POOL = 17, 6


class Stripes(nn.Module):
    """A linear classifier of digits by fixed stripes; wrong for some images, easily fooled for others."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        data = Digits()
        batch = data.training_images(600)
        pixels = batch.image.flatten(1).double() - 0.5
        codes = torch.nn.functional.one_hot(batch.label, 10).double()
        ridge = pixels.T @ pixels + 20 * torch.eye(64, dtype=torch.float64)
        weight = torch.linalg.solve(ridge, pixels.T @ (codes - 0.1)).T
        self.weight = nn.Parameter((weight + 0.01 * torch.randn(10, 64, generator=generator)).float())

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


MODEL = Stripes()


def attack(**changes: object) -> NAttack:
    arguments: dict[str, object] = {
        "steps": 8, "samples": 10, "step_size": 0.15, "shrink": 0.1, "schedule": "mean", "check_every": 2,
    }  # fmt: skip
    return NAttack(ThreatModel("linf", 0.15), **{**arguments, **changes})  # type: ignore[arg-type]


def make(folder: Path, images: int = IMAGES, **changes: object) -> Made:
    given: dict[str, object] = {"attack": attack(), "model": MODEL, "data": Digits(max_train=100), **changes}
    return make_pairs(folder=folder, images=images, pool=POOL, **given)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


def test_every_image_has_a_fate_and_they_add_up(whole: Path, tmp_path: Path) -> None:
    made = make(tmp_path)
    assert made.tried == IMAGES == made.pairs + made.wrong_at_first + made.unbroken + made.broken_at_once
    assert made.pairs > 5
    assert made.missing == 0
    shards = [load_file(path) for path in sorted(tmp_path.glob("pool.*"))]
    tried, fate = (torch.cat([shard[name] for shard in shards]) for name in ("tried", "fate"))
    dataset = Digits(max_train=100).dataset("train")
    assert torch.equal(tried, dataset.index[:IMAGES])
    batch = dataset.__getitems__(range(IMAGES))
    with torch.no_grad():
        wrong = MODEL(batch.image).argmax(1) != batch.label
    assert torch.equal(fate == Fate.WRONG_AT_FIRST, wrong)
    _, columns = read_pairs(tmp_path)
    assert columns["index"].tolist() == tried[fate == Fate.PAIR].tolist()


def test_the_mean_renders_the_adversarial_image(whole: Path) -> None:
    """By the formula of the paper, not by the attack's own rendering."""
    _, pairs = read_pairs(whole)
    x, phi = pairs["image"].double(), pairs["phi"].double()
    start = torch.atanh(0.9 * (2 * x - 1))
    rendered = (torch.tanh(start + phi) + 1) / 2
    clipped = torch.minimum(torch.maximum(rendered, x - 0.15), x + 0.15).clamp(0, 1)
    torch.testing.assert_close(pairs["x_adv"].double(), clipped, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert (MODEL(pairs["x_adv"]).argmax(1) != pairs["label"]).all()
        assert (MODEL(pairs["image"]).argmax(1) == pairs["label"]).all()
    assert (pairs["iterations"] > 0).all()
    assert (pairs["iterations"] % 2 == 0).all()  # the mean was tested every second step
    # the mean is tested before a population of 10: queries = t * 10 + tests so far
    assert torch.equal(pairs["queries"], pairs["iterations"] * 10 + pairs["iterations"] // 2 + 1)


def test_only_training_images_are_used(whole: Path) -> None:
    _, pairs = read_pairs(whole)
    data = Digits(max_train=100)
    assert set(pairs["index"].tolist()) <= set(data.dataset("train").index.tolist())
    for split in ("val", "test"):
        assert not set(pairs["index"].tolist()) & set(data.dataset(split).index.tolist())
    note = json.loads((whole / "pairs.json").read_text())
    assert note["data"]["split"] == "train"
    assert "no evaluation images" in note["what"]


def test_a_broken_run_goes_on_to_the_same_pairs(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lit_adv.pairs as module

    asked, inner = [], module.attacked

    def failing(*given: Any) -> dict[str, Tensor]:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return inner(*given)

    monkeypatch.setattr(module, "attacked", failing)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    assert len(files(tmp_path)) == 2
    (tmp_path / ".pool.000002.safetensors.part").write_bytes(b"half")
    make(tmp_path)
    assert len(asked) == 3 + 1  # of three pools two were there
    assert files(tmp_path) == files(whole)
    make(tmp_path)
    assert len(asked) == 4


def test_a_damaged_pool_is_told_and_made_again(whole: Path, tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "pool.000001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"pool.000001.safetensors is damaged and passed over"):
        make(tmp_path)
    assert files(tmp_path) == files(whole)


def test_more_images_later_are_added_to_those_there(whole: Path, tmp_path: Path) -> None:
    assert make(tmp_path, 8).tried == 8
    assert make(tmp_path).tried == IMAGES
    assert files(tmp_path) == files(whole)


def in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    make(Path(folder), rank=rank, world=2)


def test_two_processes_make_the_pairs_of_one(whole: Path, tmp_path: Path) -> None:
    mp.start_processes(in_process, args=(str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[attr-defined,no-untyped-call]
    assert files(tmp_path) == files(whole)


def test_a_process_alone_makes_its_share_as_the_environment_says(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make(tmp_path).missing == 6 + 5  # pools 0 and 2
    name = "pool.000001.safetensors"
    assert files(tmp_path) == {name: files(whole)[name]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attack": attack(step_size=0.2)}, "another attack"),
        ({"attack": attack(seed=1)}, "another attack"),
        ({"data": Digits(max_train=100, seed=1)}, "another data"),
        ({"model": nn.Sequential(Stripes())}, "another model"),
        ({"budget": 30}, "another budget"),
        ({"first": 5}, "another first"),
    ],
)
def test_a_folder_of_something_else_is_refused(whole: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"were made with {named} \(see pairs.json there\): choose another folder"):
        make(whole, **changes)


def test_other_pixels_under_the_same_name_are_noticed(tmp_path: Path) -> None:
    make(tmp_path, 6)
    data = Digits(max_train=100)
    data.white = 32
    with pytest.raises(ValueError, match="were made with another data"):
        make(tmp_path, 6, data=data)
    path = tmp_path / "pairs.json"
    note = json.loads(path.read_text())
    del note["data"]["images"]  # as an earlier version left it
    path.write_text(json.dumps(note))
    assert make(tmp_path, 6).tried == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attack": attack(schedule="samples")}, "schedule must be 'mean' to make pairs, got 'samples'"),
        ({"attack": attack(stop_at_hit=False)}, "must end at its first hit"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"budget": -1}, "budget must be at least 0, got -1"),
        ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
        ({"first": 100}, "first must be less than the 100 training images, got 100"),
        ({"rank": 2, "world": 2}, r"rank must lie in \[0, world = 2\), got 2"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(tmp_path, **changes)  # type: ignore[arg-type]


def test_what_cannot_be_broken_gives_no_pairs(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :10]

    made = make(tmp_path, model=Flat())
    assert made.pairs == made.broken_at_once == 0
    assert made.unbroken == int((Digits(max_train=100).training_images(IMAGES).label == 0).sum())
    with pytest.raises(FileNotFoundError, match="holds no pairs yet"):
        read_pairs(tmp_path)


def against(x: Tensor) -> Tensor:
    """A first mean that breaks some images at once."""
    return -0.2 * MODEL.weight[MODEL(x).argmax(1)].sign().view_as(x)


def test_a_first_mean_that_breaks_gives_no_pair(tmp_path: Path) -> None:
    made = make(tmp_path, attack=attack(initial=against))
    batch = Digits(max_train=100).training_images(IMAGES)
    x = batch.image
    with torch.no_grad():
        first = (torch.tanh(torch.atanh(0.9 * (2 * x - 1)) + against(x)) + 1) / 2
        first = torch.minimum(torch.maximum(first, x - 0.15), x + 0.15)
        right, after = (MODEL(image).argmax(1) == batch.label for image in (x, first))
    assert 0 < made.broken_at_once == int((right & ~after).sum()) < int(right.sum())
