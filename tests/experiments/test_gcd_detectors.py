"""Table 2 of GCD: what is counted, by brute force; scores are kept; no test image teaches a detector."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_adv.archive import weights_hash
from lit_adv.datamodules import Digits, ImageDataModule
from lit_adv.datamodules.attacked import AttackedBatch, AttackedImages, attacked_pools
from lit_adv.defenses import GuidedComplementary
from lit_adv.detector import NetworkDetector
from lit_adv.detectors import ImageDetector, SaliencyDetector, SensitivityDetector
from lit_adv.experiments import gcd_detectors, gcd_rectifier, gcd_scores, gcd_setup, gcd_suppression
from lit_adv.experiments.gcd_detectors import areas, matrix, rates, shown, subset
from lit_adv.experiments.gcd_scores import DETECTORS, Bench, Scored
from lit_adv.experiments.gcd_setup import ATTACKERS, Setup
from lit_adv.experiments.gcd_white_box import remade
from lit_adv.losses import cross_entropy
from lit_adv.metrics import auc
from lit_adv.models import DigitsNet
from lit_adv.protocol import Protocol

NAMES = ["org", "IS", "GCD", "sal", "InSen", "MDS", "LID*"]
ATTACKS = ["FGSM-U", "DDN-T"]


@cache
def base() -> DigitsNet:
    """A network that has learnt the digits a little."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DigitsNet(filters=(4, 8), hidden=16)
        train = Digits().training_images(400)
        optimizer = torch.optim.Adam(net.parameters(), 0.03)
        for _ in range(40):
            optimizer.zero_grad()
            cross_entropy(net(train.image), train.label).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval()


@dataclasses.dataclass(frozen=True)
class Tiny(Setup):
    """Digits, detectors that know nothing, attacks of few steps."""

    @property
    def module(self) -> Callable[..., ImageDataModule]:
        return lambda **arguments: Digits(**{**arguments, "val_split": 0.2})

    @property
    def base_path(self) -> Path:
        return Path("tiny.ckpt")

    @property
    def base(self) -> nn.Module:
        return base()

    def protocol(self, attacker: str, **changes: Any) -> Protocol:
        found = super().protocol(attacker, **changes)
        return dataclasses.replace(found, attack=remade(found.attack, steps=1 if attacker == "FGSM-U" else 8))

    def detector(self, kind: str, attackers: Sequence[str]) -> NetworkDetector:
        with torch.random.fork_rng():
            torch.manual_seed(len(attackers))
            net = DigitsNet(num_classes=2, in_channels=2 if kind == "saliency" else 1, filters=(2, 2), hidden=4)
        if kind == "sensitivity":
            return SensitivityDetector(base(), net, scaling="none").eval()
        return {"image": ImageDetector, "saliency": SaliencyDetector}[kind](base(), net).eval()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("gcd")
    return Bench(Tiny(train_pairs=40, test_pairs=12, folder=folder / "sets"), folder / "out", held=30, slow=5)


@pytest.fixture(scope="module")
def table(bench: Bench) -> dict[str, dict[str, Scored]]:
    return {attacker: {name: bench.scored(name, attacker) for name in NAMES} for attacker in ATTACKS}


def brute(clean: Tensor, adversarial: Tensor) -> float:
    more = (adversarial[:, None] > clean[None]).double() + (adversarial[:, None] == clean[None]).double() / 2
    return float(more.mean())


def test_every_detector_scores_the_pairs_that_count(bench: Bench, table: dict[str, dict[str, Scored]]) -> None:
    for attacker, found in table.items():
        ok, failed = bench.pairs(attacker)
        assert len(ok.label) == 12
        with torch.no_grad():
            assert (base()(ok.image).argmax(1) == ok.label).all()
            broken = base()(ok.x_adv).argmax(1)
            assert ((broken == ok.target) | ((ok.target < 0) & (broken != ok.label))).all()
            failing = base()(failed.x_adv).argmax(1)
            assert ((failing != failed.target) & ((failed.target >= 0) | (failing == failed.label))).all()
        _, columns = attacked_pools(bench.setup.attacked(attacker, "test")).read()
        last = int((columns["index"] == ok.index[-1]).nonzero()[0])
        assert failed.index.tolist() == columns["index"][: last + 1][~columns["success"][: last + 1]].tolist()
        for scored in found.values():
            assert (len(scored.clean), len(scored.adversarial), len(scored.failed)) == (12, 12, len(failed.label))
            assert len(scored.held) == 30
        by_image = found["org"].clean.abs() > found["IS"].clean.abs()
        assert torch.equal(found["GCD"].clean, torch.where(by_image, found["org"].clean, found["IS"].clean))


def test_the_page_of_areas_says_what_brute_force_says(bench: Bench, table: dict[str, dict[str, Scored]]) -> None:
    page = areas(bench, table, argparse.Namespace(detectors=NAMES, bootstrap=20))
    cells = {row[0]: row for row in page.rows}
    for attacker in ATTACKS:
        row = cells[attacker]
        for name, cell in zip(NAMES, row[3:], strict=True):
            one = table[attacker][name]
            assert cell.split()[0] == f"{brute(one.clean, one.adversarial):.3f}"
        assert cells[f"{attacker} (paper)"][3] == "1.00"
        ok, failed = bench.pairs(attacker)
        test = Digits(val_split=0.2)
        images = test.dataset("test").__getitems__(
            range(int((test.dataset("test").index == ok.index[-1]).nonzero()) + 1)
        )
        with torch.no_grad():
            right = base()(images.image).argmax(1) == images.label
            _, columns = attacked_pools(bench.setup.attacked(attacker, "test")).read()
            sent = dict(zip(columns["index"].tolist(), columns["x_adv"], strict=True))
            survivors = 0
            for index, label in zip(images.index[right].tolist(), images.label[right].tolist(), strict=True):
                survivors += int(base()(sent[index][None]).argmax()) == label
        assert len(ok.label) + len(failed.label) == int(right.sum())  # also those that were not moved
        assert row[2] == f"{survivors / len(images.label):.2f}"
    assert any("Goal" in note and "of the 2 attackers tried" in note for note in page.notes)


def test_a_third_class_is_no_accuracy_and_what_was_not_moved_was_attacked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images right at first of six: one broken, one in a third class, one not moved, then the last one broken."""
    digits = Digits(val_split=0.2).dataset("test").__getitems__(range(200))
    with torch.no_grad():
        classes = base()(digits.image).argmax(1)
    label, n = torch.tensor([0, 0, 0, 0]), torch.arange(4)
    x = torch.stack([digits.image[classes == k][0] for k in (1, 2, 0, 1)])
    columns = {
        "image": x, "x_adv": x, "label": label, "target": torch.ones_like(label), "index": digits.index[[0, 2, 3, 5]],
        "success": torch.tensor([True, False, False, True]), "distance": torch.tensor([1.0, 1.0, 0.0, 1.0]),
    }  # fmt: skip
    kept = columns["success"]
    ok = AttackedBatch(**{name: columns.get(name, n)[kept] for name in AttackedBatch._fields})
    for module in (gcd_scores, gcd_detectors):
        monkeypatch.setattr(module, "attacked_pools", lambda folder: SimpleNamespace(read=lambda: ({}, {**columns})))
    monkeypatch.setattr(Setup, "test", lambda self, attacker: ok)
    monkeypatch.setattr(Setup, "attacked", lambda self, attacker, split: Path("nowhere"))
    _, failed = bench.pairs("DDN-T")
    assert failed.index.tolist() == digits.index[[2, 3]].tolist()
    assert torch.equal(failed.x_adv, x[1:3])
    assert gcd_detectors._accuracy(bench, "DDN-T") == f"{1 / 6:.2f}"


def test_a_rate_below_one_image_is_left_blank(bench: Bench, table: dict[str, dict[str, Scored]]) -> None:
    one = table["FGSM-U"]["org"]
    few = {"FGSM-U": {"org": one._replace(held=one.held[:19]), "IS": one._replace(held=one.held[:20])}}
    rows = rates(bench, few).rows
    assert [row[4:] == ["", ""] for row in rows] == [True, False]
    assert rows[1][4] == ""
    assert "held-out images 30, of these for TWS 5" in str(rates(bench, few))


def test_files_of_a_part_do_not_replace_those_of_the_whole() -> None:
    assert subset(list(ATTACKERS), DETECTORS) == subset(list(ATTACKERS)) == ""
    assert subset(["PGD-U", "DDN-U"], DETECTORS) == subset(["DDN-U", "PGD-U"]) == "_pgd-u_ddn-u"
    assert subset(list(ATTACKERS), ["MDS*", "org"]) == "_org_mds-star"


def test_a_density_under_a_configuration_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist_pixelcnn.ckpt").touch()
    (tmp_path / "few.yaml").write_text("epochs: 1\n")
    made: list[tuple[str, ...]] = []

    def trained(name: str, config: str, *flags: str, folder: Path) -> Path:
        made.append((name, config, *flags))
        return folder / f"{name}.ckpt"

    monkeypatch.setattr(gcd_setup, "trained", trained)
    monkeypatch.setattr(gcd_setup, "Checkpoint", lambda path: path)
    assert Setup(checkpoints=tmp_path).density() == tmp_path / "mnist_pixelcnn.ckpt"  # type: ignore[comparison-overlap]
    assert not made
    setup = Setup(checkpoints=tmp_path, config=tmp_path / "few.yaml")
    for _ in range(2):
        setup.density(("--epochs=9",))
    name = f"{setup.tag}_mnist_pixelcnn"
    assert made == [(name, "mnist_pixelcnn", "--epochs=9", "--config", str(tmp_path / "few.yaml"))]


@pytest.mark.parametrize(
    ("main", "flags", "told"),
    [
        (gcd_detectors.main, ["--test_pairs", "0"], "--test_pairs: must be at least 1, got 0"),
        (gcd_detectors.main, ["--held", "-3"], "--held: must be at least 1, got -3"),
        (gcd_rectifier.main, ["--share", "2"], "--share: must lie in [0, 1], got 2"),
        (gcd_rectifier.main, ["--averages", "0"], "--averages: must be at least 1, got 0"),
        (gcd_suppression.main, ["--shares", "0.1", "nan"], "--shares: must lie in [0, 1], got nan"),
        (gcd_suppression.main, ["--data", "cifar10_jpeg", "--size", "small"], "--size small: for cifar10_jpeg"),
    ],
)
def test_bad_numbers_are_refused_before_any_work(
    main: Any, flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gcd_setup, "trained", lambda *given, **more: pytest.fail("trained"))
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_rates_come_from_held_out_thresholds(bench: Bench, table: dict[str, dict[str, Scored]]) -> None:
    one = table["FGSM-U"]["org"]
    row = next(row for row in rates(bench, table).rows if row[:2] == ["FGSM-U", "org"])
    limit = one.held.sort().values[-2]  # 5 % of 30 images: one may lie above
    found, alarms = (100 * float((part > limit).double().mean()) for part in (one.adversarial, one.clean))
    assert row[5] == f"{found:.1f} / {alarms:.1f}"
    assert row[2] == f"{auc(one.clean, torch.cat([one.adversarial, one.failed])):.3f} ({12 + len(one.failed)})"


def test_scores_are_kept_until_something_changes(bench: Bench, table: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*given: object, **more: object) -> Tensor:
        raise AssertionError("scored again")

    monkeypatch.setattr(gcd_scores, "scores", unexpected)
    bench.scored("org", "FGSM-U")
    with pytest.raises(AssertionError, match="scored again"):
        dataclasses.replace(bench, held=20).scored("org", "FGSM-U")


def test_no_image_serves_twice(bench: Bench, table: object) -> None:
    ok, _ = bench.pairs("FGSM-U")
    train = AttackedImages(str(bench.setup.attacked("FGSM-U", "train"))).dataset("train").pairs
    data = bench.setup.images()
    held = bench.held_images(1000)
    assert not set(train.index.tolist()) & set(held.index.tolist())  # both are places in the training data
    assert not set(data.dataset("train").index.tolist()) & set(held.index.tolist())
    pixels = {image.numpy().tobytes() for image in ok.image}
    assert not pixels & {image.numpy().tobytes() for image in train.image}


def test_the_matrix_has_every_detector_against_every_attacker(bench: Bench, table: object) -> None:
    page = matrix(bench, argparse.Namespace(attackers=ATTACKS, detectors=NAMES, cross_pairs=None))
    assert [row[:2] for row in page.rows] == [
        [detector, who] for detector in ("org", "IS", "GCD") for who in (*ATTACKS, "all, pooled")
    ]
    for row in page.rows:
        names = ATTACKS if row[1] == "all, pooled" else [row[1]]
        kind = {"org": "image", "IS": "sensitivity"}.get(row[0])
        cells = []
        for attacker in ATTACKS:
            ok = bench.setup.test(attacker)
            model: Any = bench.setup.detector(kind, names) if kind else bench.setup.defence(names)
            with torch.no_grad():
                cells.append(brute(model.margin(ok.image), model.margin(ok.x_adv)))
        worst = f"{min(round(cell, 3) for cell in cells):.3f}"
        assert row[2:] == [*(f"{cell:.3f}" for cell in cells), worst if len(names) == 1 else ""]
    assert any("80 in all" in note for note in page.notes)


def test_histograms_are_drawn_and_logged(bench: Bench, table: object) -> None:
    files = shown(bench, ATTACKS)
    assert [path.name for path in files] == ["sensitivity_l2_fgsm-u_ddn-t.png", "sensitivity_linf_fgsm-u_ddn-t.png"]
    assert all(path.stat().st_size > 1000 for path in files)
    assert list((bench.folder / "tensorboard").glob("events*"))


def test_attackers_are_the_papers_at_full_length() -> None:
    assert list(ATTACKERS) == ["FGSM-U", "PGD-U", "PGD-T", "DFool-U", "CW-U", "CW-T", "DDN-U", "DDN-T"]
    pgd = Setup().protocol("PGD-U").attack
    assert (pgd.steps, pgd.step_size, pgd.threat.radius, pgd.stop_at_hit) == (40, 0.01, 0.3, False)  # type: ignore[attr-defined]
    far = Setup(data="cifar10_jpeg", size="vgg11").protocol("PGD-T")
    assert (far.attack.threat.radius, far.target) == (8 / 255, "random")
    with pytest.raises(ValueError, match="size must be vgg11 for cifar10_jpeg"):
        _ = Setup(data="cifar10_jpeg", size="small").base_path


def test_a_training_notes_the_base_network_and_the_attack_sets(bench: Bench, table: object) -> None:
    one, both = (bench.setup.learnt_from(names) for names in (["FGSM-U"], ATTACKS))
    assert one == bench.setup.learnt_from(["FGSM-U"])
    assert one["base network"] == both["base network"] == weights_hash(base())[:16]
    assert one["attack sets"] != both["attack sets"]


def test_defences_take_detectors_of_the_setup(bench: Bench) -> None:
    defence = bench.setup.defence(ATTACKS, alpha=0.4)
    assert isinstance(defence, GuidedComplementary)
    assert defence.alpha == 0.4
    assert bench.setup.defence(["FGSM-U"]).alpha == 0.55
