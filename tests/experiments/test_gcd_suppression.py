"""Table 1 of GCD: the values taken out are those of largest sensitivity, and what is left is counted."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_adv.datamodules.attacked import AttackedBatch
from lit_adv.defenses import GuidedComplementary
from lit_adv.detector import NetworkDetector
from lit_adv.detectors import SensitivityDetector
from lit_adv.experiments import gcd_suppression
from lit_adv.experiments.gcd_setup import Setup
from lit_adv.experiments.gcd_suppression import Reading, left
from lit_adv.losses import cross_entropy
from lit_adv.models import DigitsNet


@pytest.fixture(scope="module")
def defence() -> GuidedComplementary:
    torch.manual_seed(0)
    classifier = DigitsNet(filters=(4, 4), hidden=8).double()
    detector = SensitivityDetector(classifier, DigitsNet(num_classes=2, filters=(4, 4), hidden=8).double(), "none")
    return GuidedComplementary(classifier, sensitivity_detector=detector).double().eval()


def pairs(classifier: nn.Module, images: int = 5) -> AttackedBatch:
    """Random images; the first of each pair is right, the other one is not."""
    torch.manual_seed(1)
    image = torch.rand(images, 1, 8, 8, dtype=torch.float64)
    x_adv = torch.rand(images, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        label = classifier(image).argmax(1)
    index = torch.arange(images)
    return AttackedBatch(image, x_adv, label, torch.full_like(index, -1), index + 3, index, torch.zeros_like(index))


def by_hand(defence: GuidedComplementary, x: Tensor, share: float, reading: str) -> int:
    """The class of one image (1, C, H, W) whose values of largest slope were set to 0 one by one."""
    detector = defence.sensitivity_detector
    assert detector is not None
    leaf = x.clone().requires_grad_()
    logits = defence.classifier(leaf)
    (gradient,) = torch.autograd.grad(
        cross_entropy(logits, logits.detach().argmax(1)).sum(), leaf, create_graph=reading == "image"
    )
    if reading == "map":
        gradient = gradient.detach().requires_grad_()
    scores = detector.network(gradient)
    (slope,) = torch.autograd.grad((scores[:, 1] - scores[:, 0]).sum(), leaf if reading == "image" else gradient)
    changed = x.clone().flatten()
    order = sorted(range(changed.numel()), key=lambda place: -abs(float(slope.flatten()[place])))
    for place in order[: round(share * changed.numel())]:
        changed[place] = 0.0
    with torch.no_grad():
        return int(defence.classifier(changed.view_as(x)).argmax())


@pytest.mark.parametrize("reading", ["image", "map"])
def test_what_is_left_by_hand(defence: GuidedComplementary, reading: Reading) -> None:
    given = pairs(defence.classifier)
    shares = (0.0, 0.1, 0.4, 1.0)
    found = left(defence, given, shares, reading)
    assert found.success.shape == found.clean.shape == (4, 5)
    for number, share in enumerate(shares):
        for row, label in enumerate(given.label.tolist()):
            x_adv, image = given.x_adv[row : row + 1], given.image[row : row + 1]
            assert bool(found.success[number, row]) == (by_hand(defence, x_adv, share, reading) != label)
            assert bool(found.clean[number, row]) == (by_hand(defence, image, share, reading) == label)
    assert found.clean[0].all()


def test_random_values_are_as_many_and_belong_to_the_image(
    defence: GuidedComplementary, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []
    given = pairs(defence.classifier)

    class Listening(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(x)
            return torch.zeros(len(x), 10)

    monkeypatch.setitem(defence._modules, "classifier", Listening())
    left(defence, given, (0.25,), "random")
    zeroed = asked[0] == 0
    assert zeroed.flatten(1).sum(1).tolist() == [16] * 5
    assert len({tuple(row.flatten().tolist()) for row in zeroed}) == 5
    rows = torch.tensor([4, 1])
    left(defence, AttackedBatch(*(column[rows] for column in given)), (0.25,), "random")
    assert torch.equal(asked[2] == 0, zeroed[rows])


def test_random_values_may_be_taken_from_those_that_are_not_black(defence: GuidedComplementary) -> None:
    given = pairs(defence.classifier)
    dark = given.x_adv.clone()
    dark[0, :, 1:] = 1 / 255  # 8 values are left, fewer than a quarter of 64
    dark[1, :, :4] = 0.0
    dark[2] = 0.0
    given = given._replace(x_adv=dark)
    found = left(defence, given, (0.0, 0.25), "bright")
    assert found.changed.tolist() == [[0] * 5, [8, 16, 0, 16, 16]]
    every = left(defence, given, (0.25,), "random")
    assert 0 < int(every.changed[0, 0]) < 8
    assert every.changed[0, 3] == 16
    dimmed = dark[:1].clone()
    dimmed[:, :, 0] = 0.0
    with torch.no_grad():
        wrong = bool((defence.classifier(dimmed).argmax(1) != given.label[:1]).item())
    assert bool(found.success[1, 0]) == wrong


def test_the_command_writes_the_papers_figures_beside_ours(
    defence: GuidedComplementary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = pairs(defence.classifier, 7)
    own: Any = property(lambda self: defence.classifier)

    def detector(self: Setup, kind: str, attackers: list[str]) -> NetworkDetector | None:
        assert kind == "sensitivity"
        assert len(attackers) == 1
        return defence.sensitivity_detector

    monkeypatch.setattr(Setup, "base", own)
    monkeypatch.setattr(Setup, "base_path", property(lambda self: Path("base.ckpt")))
    monkeypatch.setattr(Setup, "detector", detector)
    monkeypatch.setattr(Setup, "test", lambda self, attacker: given)
    files = gcd_suppression.main(["--folder", str(tmp_path), "--attackers", "DDN-U", "PGD-U", "--readings", "image"])
    assert [path.name for path in files] == ["suppression.md", "suppression.csv", "suppression.png"]
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["attacker"] for row in rows] == ["DDN-U (paper)", *["DDN-U"] * 3, *["PGD-U"] * 3]
    assert [row["values really changed, 30 %"] for row in rows[2:4]] == ["19.0", "19.0"]  # none is black
    paper = rows[0]
    assert [paper[f"success left, {share} %"] for share in (0, 5, 10, 30)] == ["1.000", ".656", ".785", ""]
    found = left(defence, given, (0.05,), "image")
    assert rows[1]["success left, 5 %"].split()[0] == f"{float(found.success.double().mean()):.3f}"
    assert math.isclose(
        float(rows[1]["clean accuracy, 5 %, %"]), 100 * float(found.clean.double().mean()), abs_tol=0.05
    )
