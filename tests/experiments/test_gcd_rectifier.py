"""Table 5 and figure 6 of GCD: what is counted, that answers are kept, and that they are the defences' own."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lit_adv.datamodules import Digits, ImageDataModule
from lit_adv.defenses import GuidedComplementary
from lit_adv.detector import NetworkDetector
from lit_adv.detectors import ImageDetector, SensitivityDetector
from lit_adv.draws import Draws
from lit_adv.experiments import gcd_rectified, gcd_rectifier, gcd_setup
from lit_adv.experiments.gcd_rectified import EVERY, JUDGED, Bench, Images, attacked_images, clean_images
from lit_adv.experiments.gcd_rectifier import PAPER, Line, Own, best_alphas, end_to_end
from lit_adv.experiments.gcd_setup import ATTACKERS, Setup
from lit_adv.losses import cross_entropy
from lit_adv.metrics import Records
from lit_adv.models import DigitsNet
from lit_adv.tasks.checkpoint import FORMAT, KEY
from lit_adv.tasks.recipe import build_module

NET: dict[str, Any] = {"class_path": "lit_adv.models.DigitsNet", "init_args": {"filters": [8, 8], "hidden": 16}}
TELLS: dict[str, Any] = {
    "class_path": "lit_adv.models.DigitsNet",
    "init_args": {"filters": [4, 4], "hidden": 8, "num_classes": 2},
}
DETECTORS: dict[str, type[NetworkDetector]] = {"image": ImageDetector, "sensitivity": SensitivityDetector}
TINY = ["--attackers", "FGSM-U", "PGD-T", "--train_pairs", "4", "--test_pairs", "6", "--clean", "20", "--own", "0"]


def write(path: Path, recipe: dict[str, Any], network: nn.Module) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": value for name, value in network.state_dict().items()}
    torch.save({KEY: {"format": FORMAT, "model": recipe}, "state_dict": weights}, path)
    return path


def detector_recipe(kind: str) -> dict[str, Any]:
    return {
        "class_path": f"lit_adv.detectors.{DETECTORS[kind].__name__}",
        "init_args": {"classifier": NET, "network": TELLS},
    }


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    """A small network, trained for a second."""
    torch.manual_seed(0)
    data = Digits()
    data.setup()
    image, label, _ = data.training_images()
    network = DigitsNet(**NET["init_args"])
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for step in range(80):
        part = slice(64 * step % 1024, 64 * step % 1024 + 64)
        optimizer.zero_grad()
        cross_entropy(network(image[part]), label[part]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def guarded(classifier: nn.Module) -> GuidedComplementary:
    """A defence with random detectors that flag about half of the images, and a rectifier unlike the classifier."""
    torch.manual_seed(1)
    recipe = {
        "class_path": "lit_adv.defenses.GuidedComplementary",
        "init_args": {
            "classifier": NET,
            "image_detector": detector_recipe("image"),
            "sensitivity_detector": detector_recipe("sensitivity"),
            "rectifier": NET,
            "answer": "rectify",
        },
    }
    defence = cast(GuidedComplementary, build_module(recipe))
    own = classifier.state_dict()
    for network in (defence.classifier, defence.image_detector, defence.sensitivity_detector):
        assert network is not None
        (network if network is defence.classifier else network.classifier).load_state_dict(own)  # type: ignore[union-attr]
    assert defence.rectifier is not None
    defence.rectifier.load_state_dict({name: value + 0.05 * torch.randn(value.shape) for name, value in own.items()})
    assert isinstance(defence.sensitivity_detector, SensitivityDetector)
    defence.sensitivity_detector.scale.fill_(0.01)
    data = Digits()
    data.setup("test")
    x = data.dataset("test").__getitems__(range(60)).image
    for detector in (defence.image_detector, defence.sensitivity_detector):
        assert detector is not None
        with torch.no_grad():
            middle = detector.margin(x).median()
            last = [layer for layer in detector.network.modules() if isinstance(layer, nn.Linear)][-1]
            last.bias[0] += middle
    defence.recipe = recipe  # type: ignore[assignment]
    return defence.eval()


@pytest.fixture
def asked(
    classifier: nn.Module, guarded: GuidedComplementary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, ...]]:
    """Digits for MNIST, nothing is trained; which trainings were asked for."""
    calls: list[tuple[str, ...]] = []

    def trained(name: str, config: str, *flags: str, folder: Path, **more: Any) -> Path:
        calls.append((name, config, *flags))
        if "rectifier" in config:
            return write(folder / f"{name}.ckpt", cast(Any, guarded.recipe), guarded)
        if "detector" in config:
            kind = config.rpartition("_")[2]
            detector = getattr(guarded, f"{kind}_detector")
            return write(folder / f"{name}.ckpt", detector_recipe(kind), detector)
        return write(folder / f"{name}.ckpt", NET, classifier)

    def images(self: Setup, **arguments: Any) -> ImageDataModule:
        return Digits(val_split=50, **arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gcd_setup, "trained", trained)
    monkeypatch.setattr(gcd_rectified, "trained", trained)
    monkeypatch.setattr(Setup, "images", images)
    return calls


@pytest.fixture
def few() -> Images:
    data = Digits()
    data.setup("test")
    image, label, index = data.dataset("test").__getitems__(range(24))
    return Images("few", image, label, index, torch.ones(24, dtype=torch.bool))


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_attacked_images_end_with_the_success_that_completes_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    success = torch.tensor([False, True, True, False, True, False, True])
    columns = {name: torch.arange(7) for name in ("x_adv", "label", "index")} | {"success": success}
    setup = Setup(test_pairs=3)
    monkeypatch.setattr(Setup, "attacked", lambda self, attacker, split: Path(attacker) / split)

    class Pools:
        def __init__(self, folder: Path) -> None:
            assert folder == Path("DDN-U/test")

        def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
            return {}, columns

    monkeypatch.setattr(gcd_rectified, "attacked_pools", Pools)
    found = attacked_images(setup, "DDN-U")
    assert found.index.tolist() == [0, 1, 2, 3, 4]
    assert found.success.tolist() == [False, True, True, False, True]
    assert attacked_images(Setup(test_pairs=9), "DDN-U").index.tolist() == list(range(7))


def test_answers_are_kept_by_image_and_by_what_decides_them(few: Images, tmp_path: Path) -> None:
    seen: list[int] = []

    def ask(x: Tensor, draws: Draws) -> Tensor:
        seen.extend(draws.index.tolist())
        return torch.stack([(255 * x.flatten(1).sum(1)).long(), draws.index], 1)

    first = Images("few", *(column[:10] for column in few[1:]))
    bench = Bench(Setup(), tmp_path)
    found = bench.kept({"by": 1}, first, ask)
    assert seen == first.index.tolist()
    again = bench.kept({"by": 1}, few, ask)
    assert seen == few.index.tolist()
    torch.testing.assert_close(again[:10], found)
    assert again[:, 1].tolist() == few.index.tolist()
    moved = few.x.clone()
    moved[3] = 1 - moved[3]
    changed = bench.kept({"by": 1}, few._replace(x=moved), ask)
    assert seen[len(few.x) :] == [int(few.index[3])]
    assert changed[3, 0] == (255 * moved[3].sum()).long()
    bench.kept({"by": 2}, first, ask)
    Bench(Setup(), tmp_path, seed=1).kept({"by": 1}, first, ask)
    bench.kept({"by": 1}, first._replace(name="others"), ask)
    assert len(seen) == len(few.x) + 1 + 30


def test_judged_is_what_the_defence_does_to_each_image_alone(
    guarded: GuidedComplementary, few: Images, tmp_path: Path
) -> None:
    bench = Bench(Setup(), tmp_path, seed=5)
    found = bench.judged(guarded, few)
    passed = bench.passed(guarded, few)
    assert guarded.rectifier is not None
    flags = 0
    for row in range(len(few.x)):
        x = few.x[row : row + 1]
        draws = Draws(5, few.index[row : row + 1], torch.zeros(1, dtype=torch.int64), gcd_rectified._KEY)
        patched = guarded.patched(x, draws)
        flagged = bool(guarded.margin(x) > 0)
        flags += flagged
        with torch.no_grad():
            oracle, bare = int(guarded.rectifier(patched).argmax()), int(guarded.classifier(patched).argmax())
            pipeline = oracle if flagged else int(guarded.classifier(x).argmax())
        assert found[row].tolist() == [pipeline, oracle, bare, flagged, int(guarded.suspects(x).sum())]
        assert passed[row].tolist() == [pipeline, flagged]
    assert 0 < flags < len(few.x)
    assert (found[:, JUDGED.index("oracle")] != found[:, JUDGED.index("pipeline")]).any()


def test_answers_are_found_by_a_defence_that_was_never_asked(
    guarded: GuidedComplementary, few: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "defence.ckpt", cast(Any, guarded.recipe), guarded)
    first, second = (Bench(Setup(), tmp_path)._read(path) for _ in range(2))
    bench = Bench(Setup(), tmp_path)
    others = few._replace(name="others")

    def answers(defence: GuidedComplementary, images: Images) -> list[Tensor]:
        swept = bench.swept(defence, images, (0.5,), ("threshold",))
        return [bench.judged(defence, images), swept, bench.passed(defence, images)]

    noted = {images.name: answers(first, images) for images in (few, others)}  # settles what the networks share

    def forbidden(*args: Any) -> Tensor:
        raise AssertionError("an image was asked again")

    monkeypatch.setattr(gcd_rectified, "label", forbidden)
    monkeypatch.setattr(gcd_rectified, "suspects", forbidden)
    for images in (others, few):
        found = answers(second, images)
        assert all(torch.equal(now, then) for now, then in zip(found, noted[images.name], strict=True))


def test_sweep_at_the_defences_own_alpha_is_its_oracle(
    guarded: GuidedComplementary, few: Images, tmp_path: Path
) -> None:
    bench = Bench(Setup(), tmp_path)
    found = bench.swept(guarded, few, (0.1, 0.55, 1.0), ("threshold", "quantile"))
    assert found.shape == (24, 2, 3, 2)
    judged = bench.judged(guarded, few)
    assert found[:, 0, 1, 0].tolist() == judged[:, JUDGED.index("oracle")].tolist()
    assert found[:, 0, 1, 1].tolist() == judged[:, JUDGED.index("without fine-tuning")].tolist()
    other = bench.judged(guarded.variant(mode="quantile", alpha=0.1), few)
    assert found[:, 1, 0, 0].tolist() == other[:, JUDGED.index("oracle")].tolist()
    with torch.no_grad():  # nothing is suspect at 1 by the printed equation
        assert found[:, 0, 2, 1].tolist() == guarded.classifier(few.x).argmax(1).tolist()


def test_a_threshold_that_rectifies_every_image(guarded: GuidedComplementary, few: Images) -> None:
    draws = Draws(0, few.index, torch.zeros_like(few.index))
    every = guarded.variant(threshold=EVERY)(few.x, draws)
    assert guarded.rectifier is not None
    torch.testing.assert_close(every, guarded.rectifier(guarded.patched(few.x, draws)))


def test_end_to_end_counts_by_hand() -> None:
    label = torch.tensor([0, 1, 2, 3])
    images = Images("PGD-T", torch.zeros(4, 1, 2, 2), label, label, torch.tensor([True, True, True, False]))
    judged = torch.tensor([[0, 0, 5, 1, 2], [7, 1, 1, 0, 0], [2, 2, 7, 1, 4], [3, 7, 7, 0, 2]])
    clean = Images("clean", torch.zeros(2, 1, 2, 2), torch.tensor([4, 5]), label[:2], torch.zeros(2, dtype=torch.bool))
    line = Line("PGD-T", "own", 0.6, images, judged, clean, torch.tensor([[4, 0], [9, 1]]))
    page = end_to_end([line], {}, {})
    (row,) = (dict(zip(page.heads, row, strict=True)) for row in page.rows)
    assert (row["found"], row["false alarms"], row["suspects, % of values"]) == ("66.7", "50.0", "50.0")
    assert (row["clean, pipeline"], row["attacked, pipeline"], row["half and half"]) == ("50.0", "75.0", "62.5")
    assert (row["successes"], row["of these: pipeline"], row["oracle"]) == ("3", "66.7", "100.0")
    assert row["without fine-tuning"] == "33.3"


def test_a_distance_to_break_is_told_of_attacks_without_a_radius_alone() -> None:
    label = torch.tensor([0, 1])
    lines = []
    for name in ("PGD-U", "DDN-U"):
        images = Images(name, torch.zeros(2, 1, 2, 2), label, label, torch.tensor([True, False]))
        judged = torch.tensor([[0, 0, 5, 1, 2], [1, 1, 1, 0, 0]])
        lines.append(Line(name, "own", 0.55, images, judged, images, judged[:, [0, 3]]))
    owns = {"ddn_at": {name: Own(0.5, 2.5, 4) for name in ("PGD-U", "DDN-U")}}
    assert [row[-1] for row in end_to_end(lines, owns, {}).rows] == ["", "2.50"]
    found = {name: torch.tensor([True, False]) for name in ("clean", "PGD-U", "DDN-U")}
    page = gcd_rectifier.table(lines, {"f": found, "ddn_at": found}, owns, "mnist", [], {})
    assert [row[page.heads.index("DDN-AT, attacked itself")] for row in page.rows] == ["", "50.0", "(50.0)"]


def test_the_best_alphas_are_those_within_one_image() -> None:
    assert best_alphas([0.0] * 9, 200) == "-"
    assert best_alphas([10.5, 10.5, 6.5, 4.5, 5.0, 3.5, 2.5, 2.0, 2.5], 200) == "0.1-0.2: at the end"
    assert best_alphas([54.0, 66.0, 72.0, 86.0, 79.5, 81.0, 86.0, 85.5, 85.0], 200) == "0.4, 0.7-0.8: inside"
    assert best_alphas([0.0, 0.0, 0.0, 0.0, 50.0, 0.0, 0.0, 0.0, 0.0], 2) == (
        "0.1-0.9: at the end"  # one image of two
    )


def test_an_attack_on_the_network_itself_counts_what_it_got_right_at_first(
    classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch.tensor([True, True, False, True, True])
    verified = torch.tensor([True, False, False, True, True])
    columns = {field.name: torch.zeros(5, dtype=torch.int64) for field in fields(Records)}
    columns |= {"clean_correct": right, "verified": verified, "l2": torch.tensor([3.0, 9.0, 9.0, 1.0, 2.0])}
    seen: dict[str, Any] = {}

    def evaluate(model: nn.Module, data: Any, protocols: Sequence[Any], **given: Any) -> Any:
        seen.update(given, names=[protocol.name for protocol in protocols])
        return SimpleNamespace(outcomes=[SimpleNamespace(name="DDN-U", records=Records(**columns))])

    monkeypatch.setattr(gcd_rectifier, "evaluate", evaluate)
    bench = Bench(Setup(), tmp_path)
    found = gcd_rectifier.own(bench, "ddn_at", classifier, argparse.Namespace(attackers=["DDN-U"], own=5))
    assert found == {"DDN-U": (0.25, 2.0, 4)}
    assert (seen["names"], seen["max_samples"], seen["dirpath"]) == (["DDN-U"], 5, tmp_path / "own_ddn_at")


def test_rectifier_of_detectors_since_trained_anew_is_refused(
    asked: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(Setup(train_pairs=4, test_pairs=4), tmp_path)
    bench.rectified(["FGSM-U"], 0.55)
    paths = Setup.detector_path
    other = write(tmp_path / "x_image_y.ckpt", detector_recipe("image"), build_module(detector_recipe("image")))

    def path(self: Setup, kind: str, attackers: Sequence[str]) -> Path:
        return other if kind == "image" else paths(self, kind, attackers)

    monkeypatch.setattr(Setup, "detector_path", path)
    with pytest.raises(ValueError, match="another image detector"):
        Bench(Setup(train_pairs=4, test_pairs=4), tmp_path).rectified(["FGSM-U"], 0.55)


def test_the_command_writes_its_pages_and_asks_nothing_twice(
    asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = gcd_rectifier.main([*TINY, "--columns", "tvm", "pgd_at"])
    names = [path.name for path in files]
    for stem in ("rectifier", "end_to_end", "alpha"):
        assert {f"{stem}.md", f"{stem}.csv"} <= set(names)
    assert sum(name.endswith(".png") for name in names) == 4
    table = {(row["attacker"], row["alpha"]): row for row in cells(next(p for p in files if p.name == "rectifier.csv"))}
    assert set(table) == {("clean", "0.55"), ("FGSM-U", "0.55"), ("PGD-T", "0.55"), ("PGD-T", "0.60")}
    for name in ("clean", "FGSM-U", "PGD-T"):
        assert [table[name, "0.55"][f"paper: {head}"] for head in gcd_rectifier.PAPER_HEADS] == list(
            PAPER["mnist"][name]
        )
    # the "adversarially trained" network is the classifier itself here
    assert table["FGSM-U", "0.55"]["PGD-AT, same images"] == table["FGSM-U", "0.55"]["F"]
    assert table["PGD-T", "0.60"]["F"] == ""
    failed = attacked_images(Setup(train_pairs=4, test_pairs=6), "FGSM-U")
    assert table["FGSM-U", "0.55"]["images"] == str(len(failed.label))
    assert table["FGSM-U", "0.55"]["F"] == f"{100 * float((~failed.success).double().mean()):.1f}"
    rectifiers = [call for call in asked if "rectifier" in call[1]]
    assert {flag for call in rectifiers for flag in call if "alpha" in flag} == {
        "--model.model.alpha=0.55", "--model.model.alpha=0.6",
    }  # fmt: skip
    assert any("pooled" in call[0] for call in rectifiers)

    def forbidden(*args: Any) -> Tensor:
        raise AssertionError("an image was asked again")

    before = {path: path.read_text() for path in files if path.stem in ("rectifier", "end_to_end")}
    monkeypatch.setattr(gcd_rectified, "label", forbidden)
    monkeypatch.setattr(gcd_rectified, "suspects", forbidden)
    gcd_rectifier.main([*TINY, "--columns", "tvm", "pgd_at", "--no-sweep"])
    assert {path: path.read_text() for path in before} == before


def test_clean_images_are_the_first_of_the_test_set(asked: list[tuple[str, ...]]) -> None:
    found = clean_images(Setup(), 7)
    data = Digits()
    data.setup("test")
    torch.testing.assert_close(found.x, data.dataset("test").__getitems__(range(7)).image)
    assert not found.success.any()


def test_the_papers_table_has_every_attacker() -> None:
    for data in PAPER.values():
        assert set(data) == {"clean", *ATTACKERS}
        assert {len(row) for row in data.values()} == {6}
