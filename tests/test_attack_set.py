"""Adversarial images made once: what the columns say, and that runs broken off, shared or changed are noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from attacked_digits import DATA, IMAGES, MODEL, POOL, Linear, ddn, decided, fgsm, files, make, read
from safetensors.torch import load_file
from torch import Tensor, nn

import lit_adv.attack_set as module
from lit_adv.archive import weights_hash
from lit_adv.attack_set import Made
from lit_adv.attacks import PGD, DeepFool
from lit_adv.datamodules import Digits
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.look import targets
from lit_adv.oracle import QueryOracle
from lit_adv.protocol import Protocol
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


def test_columns_are_those_of_one_gradient_step(tmp_path: Path) -> None:
    """FGSM by autograd: x + eps sign(grad of the cross-entropy), cut to the box, broken where the label changes."""
    made = make(tmp_path)
    batch = DATA.training_images(IMAGES)
    right = decided(batch.image) == batch.label
    x, y, index = (part[right] for part in batch)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(MODEL(leaf), y, reduction="sum"), leaf)
    moved = (x + 0.1 * gradient.sign()).clamp(0, 1)
    found = read(tmp_path)
    assert torch.equal(found["image"], x)
    assert torch.equal(found["index"], index)
    assert torch.equal(found["label"], y)
    torch.testing.assert_close(found["x_adv"], moved, rtol=0, atol=1e-6)  # unbroken images, too: they lie in the ball
    assert torch.equal(found["success"], decided(moved) != y)
    torch.testing.assert_close(found["distance"], (moved - x).flatten(1).norm(dim=1))
    assert found["target"].tolist() == [-1] * len(y)
    assert made == Made(IMAGES, int(right.sum()), int((decided(moved) != y).sum()), 0)
    assert 0 < made.successes < made.right < IMAGES
    tried = torch.cat([load_file(path)["tried"] for path in sorted(tmp_path.glob("pool.*"))])
    assert torch.equal(tried, batch.index)
    assert str(made) == f"{made.successes} successes of {made.right} images right at first, of {IMAGES} tried"


def test_columns_are_the_attacks_own(tmp_path: Path) -> None:
    """All images at once, the attack called directly: pools and their numbers change nothing."""
    attack = PGD(ThreatModel("linf", 0.1), steps=5, seed=4)
    make(tmp_path, attack=attack, target="next", budget=4)
    batch = DATA.training_images(IMAGES)
    right = decided(batch.image) == batch.label
    x, y, index = (part[right] for part in batch)
    result = attack(QueryOracle(MODEL, len(x), budget=4, known_right=True), x, y, (y + 1) % 10, index)
    found = read(tmp_path)
    torch.testing.assert_close(found["x_adv"], result.x_adv, rtol=0, atol=1e-6)
    assert torch.equal(found["success"], result.success)
    assert torch.equal(found["queries"], result.queries)
    assert torch.equal(found["target"], (y + 1) % 10)
    assert torch.equal(decided(found["x_adv"])[result.success], found["target"][result.success])


def test_an_attack_without_radius_that_finds_nothing_leaves_the_image(tmp_path: Path) -> None:
    attack = ddn(steps=2)
    made = make(tmp_path, attack=attack, target="next", images=20)
    found = read(tmp_path)
    failed = ~found["success"]
    assert 0 < int(failed.sum()) == made.right - made.successes < made.right
    assert torch.equal(found["x_adv"][failed], found["image"][failed])
    assert (found["distance"][failed] == 0).all()
    assert (found["distance"][~failed] > 0).all()


def test_the_test_split_is_attacked_as_such(tmp_path: Path) -> None:
    make(tmp_path, split="test")
    assert set(read(tmp_path)["index"].tolist()) <= set(DATA.dataset("test").index[:IMAGES].tolist())
    note = json.loads((tmp_path / "attack_set.json").read_text())
    assert (note["split"], note["data"]["max_test"]) == ("test", None)
    assert not {"seed", "val_split", "max_train"} & note["data"].keys()  # which test images there are they do not touch


def test_the_note_holds_what_decides(whole: Path) -> None:
    note = json.loads((whole / "attack_set.json").read_text())
    assert note["attack"]["class_path"] == "lit_adv.attacks.pgd.PGD"
    assert note["attack"]["init_args"]["threat"]["init_args"]["eps"] == 0.1
    assert note["model"] == weights_hash(MODEL)
    data = {"name": "digits", "num_classes": 10, "dims": [1, 8, 8], "seed": 42, "val_split": 0.2, "max_train": 100}
    assert data.items() <= note["data"].items()
    settings = {"split": "train", "first": 0, "pool": POOL, "target": "none", "quantise": False, "budget": None}
    assert settings.items() <= note.items()


def test_transforms_and_the_mode_of_the_model_are_left_out(whole: Path, tmp_path: Path) -> None:
    make(
        tmp_path, model=(model := Linear().train()), data=Digits(max_train=100, train_transforms=nn.Threshold(2.0, 0.0))
    )
    assert model.training
    assert files(tmp_path) == files(whole)


def test_a_broken_run_goes_on_to_the_same_images(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    make(tmp_path, 10)
    make(tmp_path, wanted=1)
    assert len(asked) == 4


def test_a_damaged_pool_is_told_and_made_again(whole: Path, tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "pool.000001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"pool.000001.safetensors is damaged and passed over"):
        make(tmp_path)
    assert files(tmp_path) == files(whole)


def test_more_images_later_are_added_to_those_there(whole: Path, tmp_path: Path) -> None:
    first = make(tmp_path, 11)
    assert first.tried == 11
    assert make(tmp_path).tried == IMAGES
    assert files(tmp_path) == files(whole)
    assert make(tmp_path, 11) == first  # counted to the image, though its pool holds more by now


def in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    make(Path(folder), rank=rank, world=2)


def test_two_processes_make_what_one_makes(whole: Path, tmp_path: Path) -> None:
    mp.start_processes(in_process, args=(str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[attr-defined,no-untyped-call]
    assert files(tmp_path) == files(whole)


def test_a_process_alone_makes_its_share_as_the_environment_says(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = make(tmp_path)
    assert made.missing == 8 + 6  # pools 0 and 2
    assert str(made).endswith(", 14 images still missing")
    name = "pool.000001.safetensors"
    assert files(tmp_path) == {name: files(whole)[name]}


def successes_by_pool(folder: Path) -> list[int]:
    return [int(load_file(path)["success"].sum()) for path in sorted(folder.glob("pool.*"))]


def test_the_work_ends_with_the_pool_that_completes_what_is_wanted(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    make(tmp_path / "all", 80)
    each = successes_by_pool(tmp_path / "all")
    wanted = sum(each[:3]) + 1
    last = next(number for number in range(len(each)) if sum(each[: number + 1]) >= wanted)
    assert 2 < last < 8
    made = make(one, 80, wanted=wanted)
    assert (made.tried, made.successes, made.missing) == (8 * (last + 1), sum(each[: last + 1]), 0)
    assert successes_by_pool(one) == each[: last + 1]
    # two processes, the second of which knows nothing of the first and makes all of its share
    assert make(two, 80, wanted=wanted, rank=1, world=2).missing == 40
    assert make(two, 80, wanted=wanted, rank=0, world=2) == made
    assert len(files(two)) == 5 + last // 2 + 1
    assert files(one).items() <= files(two).items()  # what lies beyond is not served
    assert all(torch.equal(value, read(two)[name]) for name, value in read(one).items())
    more = make(one, 80, wanted=wanted + each[last + 1] + 10)
    assert more.successes > made.successes
    assert make(one, 80, wanted=10_000).tried == 80
    assert files(one) == files(tmp_path / "all")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attack": fgsm(0.11)}, "attack"),
        ({"attack": PGD(ThreatModel("linf", 0.1), seed=1)}, "attack"),
        ({"data": Digits(max_train=100, seed=1)}, "data"),
        ({"data": Digits(max_train=50)}, "data"),
        ({"model": nn.Sequential(Linear())}, "model"),
        ({"split": "test"}, "data, split"),
        ({"budget": 30}, "budget"),
        ({"first": 5}, "first"),
        ({"target": "random", "quantise": True}, "quantise, target"),
    ],
)
def test_a_changed_configuration_is_noticed(whole: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"were made with another {named} \(see attack_set.json there\): choose"):
        make(whole, **changes)


def test_other_pixels_under_the_same_name_are_noticed(whole: Path) -> None:
    data = Digits(max_train=100)
    data.white = 32
    with pytest.raises(ValueError, match="were made with another data"):
        make(whole, data=data)


def test_random_targets_depend_on_seed_and_image_alone(tmp_path: Path) -> None:
    make(tmp_path / "a", attack=ddn(), target="random")
    make(tmp_path / "b", attack=ddn(), target="random", pool=5, first=3)
    make(tmp_path / "c", attack=ddn(seed=1), target="random")
    a, b, c = (read(tmp_path / name) for name in "abc")
    known = dict(zip(a["index"].tolist(), a["target"].tolist(), strict=True))
    both = [row for row, index in enumerate(b["index"].tolist()) if index in known]
    assert len(both) > 10
    assert all(known[int(b["index"][row])] == int(b["target"][row]) for row in both)
    assert (a["target"] != a["label"]).all()
    assert (a["target"] != c["target"]).any()
    assert torch.equal(decided(a["x_adv"])[a["success"]], a["target"][a["success"]])


def test_random_targets_are_uniform_over_the_other_classes() -> None:
    y, index = torch.arange(9000) % 3, torch.arange(9000)
    goal = targets("random", MODEL, torch.zeros(9000, 1, 1, 1), y, index, 4, 0, 512)
    assert goal is not None
    table = torch.zeros(3, 4).index_put_((y, goal), torch.ones(9000), accumulate=True)
    assert (table.diagonal() == 0).all()
    expected = 1000 * (1 - torch.eye(3, 4))
    assert ((table - expected).abs() < 5 * 1000**0.5 * (1 - torch.eye(3, 4)) + 1e-9).all()


@pytest.mark.parametrize("rule", ["next", "random", "least_likely"])
def test_targets_are_those_of_a_trial(rule: Any, tmp_path: Path) -> None:
    trial = Trial(Protocol(name="x", attack=ddn(seed=3), target=rule), MODEL, num_classes=10)
    trial.add(DATA.training_images(IMAGES))
    records = trial.close()
    make(tmp_path, attack=ddn(seed=3), target=rule)
    found = read(tmp_path)
    expected = dict(zip(records.index.tolist(), records.target.tolist(), strict=True))
    assert found["target"].tolist() == [expected[index] for index in found["index"].tolist()]


def test_rounding_to_8_bits_is_judged_anew(tmp_path: Path) -> None:
    attack = DeepFool(overshoot=1e-4)  # ends so close to the boundary that rounding carries some back
    make(tmp_path / "floats", attack=attack, images=60)
    make(tmp_path / "bytes", attack=attack, images=60, quantise=True)
    plain, rounded = read(tmp_path / "floats"), read(tmp_path / "bytes")
    assert plain["success"].all()
    by_hand = (plain["x_adv"] * 255).round() / 255
    torch.testing.assert_close(rounded["x_adv"], by_hand)
    assert torch.equal(rounded["success"], decided(by_hand) != plain["label"])
    assert 0 < int(rounded["success"].sum()) < len(plain["label"])
    torch.testing.assert_close(rounded["distance"], (by_hand - plain["image"]).flatten(1).norm(dim=1))


def test_a_random_defence_is_judged_by_many_draws(tmp_path: Path) -> None:
    class Shaky(Defense):
        stochastic = True

        def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
            assert draws is not None
            logits: Tensor = MODEL(x + 0.05 * draws.normal(*x.shape[1:]))
            return logits

    attack = PGD(ThreatModel("linf", 0.15), steps=3)
    made = make(tmp_path, model=Shaky(), attack=attack, images=12)
    assert made.successes > 0
    assert make(tmp_path / "again", model=Shaky(), attack=attack, images=12, rank=1, world=2).missing == 8
    name = "pool.000001.safetensors"
    assert files(tmp_path)[name] == files(tmp_path / "again")[name]


def test_what_is_random_without_saying_so_is_refused(tmp_path: Path) -> None:
    class Restless(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    with pytest.raises(ValueError, match="Restless answers the same images differently when asked again"):
        make(tmp_path / "x", model=Restless())
    assert not (tmp_path / "x").exists()


def test_an_attack_that_must_learn_learns_from_training_images(tmp_path: Path) -> None:
    class Learning(PGD):
        seen: list[int] = []  # noqa: RUF012

        @property
        def needs_fit(self) -> bool:
            return not self.seen

        @property
        def fitted_on(self) -> str:
            return "images"

        def fit(self, images: Tensor, labels: Tensor, path: str | None = None) -> None:
            assert path == str(tmp_path / "fitted.safetensors")
            self.seen.append(len(images))

    make(tmp_path, attack=Learning(ThreatModel("linf", 0.1), steps=2), split="test")
    assert Learning.seen == [100]
    Learning.seen.clear()
    with pytest.raises(ValueError, match="made with another attack"):  # before anything is learnt and written there
        make(tmp_path, attack=Learning(ThreatModel("linf", 0.1), steps=3), split="test")
    assert Learning.seen == []
    make(tmp_path, attack=Learning(ThreatModel("linf", 0.1), steps=2), split="test")
    assert json.loads((tmp_path / "attack_set.json").read_text())["learnt"] == {"fitted_on": "images"}


def test_no_success_at_all_names_the_attack_and_the_remedy(tmp_path: Path) -> None:
    right = int((decided(DATA.training_images(IMAGES).image) == DATA.training_images(IMAGES).label).sum())
    said = rf"PGD broke none of {IMAGES} images \({right} of them right at first\): give it more images or steps"
    with pytest.raises(ValueError, match=said):
        make(tmp_path / "a", attack=fgsm(0.0))
    assert make(tmp_path / "b", attack=fgsm(0.0), rank=0, world=2).missing == 8  # another process may still find some
    upside_down = Linear()
    upside_down.weight.data.mul_(-1)
    with pytest.raises(ValueError, match=r"\(0 of them right at first\): Linear is right about none of them"):
        make(tmp_path / "c", model=upside_down, images=5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"wanted": 0}, "wanted must be at least 1, got 0"),
        ({"pool": 0}, "pool must be at least 1, got 0"),
        ({"first": -1}, "first must be at least 0, got -1"),
        ({"first": 100}, "first must be less than the 100 images of split 'train', got 100"),
        ({"split": "val"}, "split must be 'train' or 'test', got 'val'"),
        ({"device": "nonsense"}, r"device 'nonsense' cannot be used \(.*\): choose another, e.g. cpu"),
        ({"target": "nearest"}, "target must be none, next, random or least_likely, got 'nearest'"),
        ({"rank": 2, "world": 2}, r"rank must lie in \[0, world = 2\), got 2"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))}, "answers 3 classes and the data set has 10"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()
