"""Table 2 of GCD: what is counted, by brute force; scores are kept; no test image teaches a detector."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_adv.datamodules import Digits, ImageDataModule
from lit_adv.datamodules.attacked import AttackedImages
from lit_adv.defenses import GuidedComplementary
from lit_adv.detector import NetworkDetector
from lit_adv.detectors import ImageDetector, SaliencyDetector, SensitivityDetector
from lit_adv.experiments import gcd_scores
from lit_adv.experiments.gcd_detectors import areas, matrix, rates, shown
from lit_adv.experiments.gcd_scores import Bench, Scored
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
        survivors = int(right.sum()) - len(ok.label)  # attacked and not broken
        assert survivors >= len(failed.label)  # an attack without a radius may leave an image as it was
        assert row[2] == f"{survivors / len(images.label):.2f}"
    assert any("Goal" in note for note in page.notes)


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
        assert row[2:] == [*(f"{cell:.3f}" for cell in cells), f"{min(round(cell, 3) for cell in cells):.3f}"]


def test_histograms_are_drawn_and_logged(bench: Bench, table: object) -> None:
    files = shown(bench, ATTACKS)
    assert [path.name for path in files] == ["sensitivity_l2.png", "sensitivity_linf.png"]
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


def test_defences_take_detectors_of_the_setup(bench: Bench) -> None:
    defence = bench.setup.defence(ATTACKS, alpha=0.4)
    assert isinstance(defence, GuidedComplementary)
    assert defence.alpha == 0.4
    assert bench.setup.defence(["FGSM-U"]).alpha == 0.55
