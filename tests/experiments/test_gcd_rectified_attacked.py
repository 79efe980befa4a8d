"""The rectifying pipeline under attack: what is counted, and by whom it is attacked."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_adv.attacks import Transfer
from lit_adv.defenses import GuidedComplementary
from lit_adv.detectors import ImageDetector, SensitivityDetector
from lit_adv.experiments import gcd_rectified_attacked as experiment
from lit_adv.experiments.gcd_rectified_attacked import row, ways
from lit_adv.experiments.gcd_setup import Setup
from lit_adv.metrics import Records
from lit_adv.metrics.summary import wilson
from lit_adv.models import DigitsNet
from lit_adv.tables import interval


def defence() -> GuidedComplementary:
    torch.manual_seed(0)
    base = DigitsNet(filters=(2, 4), hidden=8)
    tells = [DigitsNet(num_classes=2, filters=(2, 2), hidden=4) for _ in range(2)]
    of_map = SensitivityDetector(base, tells[1], scaling="none")
    again = DigitsNet(filters=(2, 4), hidden=8)
    return GuidedComplementary(base, ImageDetector(base, tells[0]), of_map, again, answer="rectify").eval()


def records(right: list[bool], broken: list[bool]) -> Records:
    columns: dict[str, Any] = {name: torch.zeros(len(right)) for name in Records.empty().columns()}
    columns |= {
        "index": torch.arange(len(right)),
        "clean_correct": torch.tensor(right),
        "verified": torch.tensor(broken),
    }
    columns["l2"] = torch.arange(len(right), dtype=torch.float64)
    return Records(**columns)


def test_images_wrong_when_clean_are_no_robust_ones() -> None:
    line = row("linf 0.3", "pgd", records([True, True, True, False], [True, False, False, False]))
    assert line == ["linf 0.3", "pgd", "4", "75.0", "50.0", interval(wilson(2, 4)), "0.00"]


def test_half_of_the_ways_hide_from_the_detectors() -> None:
    whole = defence()
    found = ways(Setup(), whole, argparse.Namespace(queries=10))
    assert list(found) == ["linf 0.3", "l2 2"]
    for protocols in found.values():
        hiding = [protocol.attack for protocol in protocols if "hiding" in protocol.name]
        assert hiding
        for attack in hiding:
            assert isinstance(attack, Transfer)
            (source,) = attack.models
            assert isinstance(source, GuidedComplementary)
            assert source.reject == 10
            assert source.image_detector is whole.image_detector
            assert source.sensitivity_detector is whole.sensitivity_detector
    assert {protocol.attack.threat.radius for protocol in found["linf 0.3"]} == {0.3}
    assert {protocol.attack.threat.radius for protocol in found["l2 2"]} == {2.0}


def test_the_command_ends_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_adv.datamodules import Digits

    class Tiny(Setup):
        def images(self, **arguments: Any) -> Digits:  # type: ignore[override]
            return Digits(val_split=0.2)

    def line(*given: Any) -> tuple[argparse.Namespace, Setup]:
        return argparse.Namespace(images=3, queries=5, folder=tmp_path), Tiny()

    plain = ways(Setup(), defence(), argparse.Namespace(queries=5))
    few = {name: [replace(protocol, draws=3) for protocol in some[:2]] for name, some in plain.items()}
    monkeypatch.setattr(experiment, "command_line", line)
    monkeypatch.setattr(experiment.Bench, "rectified", lambda *given: defence())
    monkeypatch.setattr(experiment, "ways", lambda *given: few)
    files = experiment.main([])
    text = files[0].read_text()
    assert text.count("worst case per image") == 2
    assert "pgd_own_gradient" in text
