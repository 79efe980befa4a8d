"""The ladder's table: what its rungs share, what is printed and written, and that it goes on where it stopped."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_adv.attacks import PGD, NAttack
from lit_adv.datamodules import Digits
from lit_adv.estimators import NES
from lit_adv.experiments.invariance import trained
from lit_adv.experiments.ladder import CHANGES, RELEASED, Scaled, Setting, climb, main, rungs, written
from lit_adv.losses import cross_entropy, hinge
from lit_adv.threat import ThreatModel

SETTING = Setting(ThreatModel("linf", 0.25), budget=130, directions=10, step_size=0.05)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own, and take seconds."""
    monkeypatch.setattr("lit_adv.report.Report.write", lambda *_: {})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    data = Digits(batch_size=64)
    data.setup()
    return trained("digits", data).eval().requires_grad_(False)


class Counted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._asked: list[int] = []  # no setting by which runs are known

    def forward(self, x: Tensor) -> Tensor:
        self._asked.append(len(x))
        logits: Tensor = self.model(x)
        return logits


def test_every_rung_has_the_same_step_size_sigma_and_directions() -> None:
    attacks = rungs(SETTING)
    assert attacks.keys() == CHANGES.keys()
    assert len(attacks) == 8 + 2
    for name, attack in attacks.items():
        assert attack.threat == SETTING.threat
        if isinstance(attack, PGD):
            assert isinstance(attack.estimator, NES)
            assert attack.estimator.samples == 20
            assert attack.estimator.sigma == (1e-3 if name == "QL, its own sigma" else 0.1)
            assert attack.plateau == 5
        else:
            assert isinstance(attack, NAttack)
            assert attack.samples == (10 if name in ("NATTACK", RELEASED) else 20)
            assert attack.sigma == 0.1
            assert attack.init_std == 0
        assert attack.step_size == 0.05
        assert attack.steps * (10 if name in ("NATTACK", RELEASED) else 20) >= 130


def test_the_rungs_differ_as_the_table_says() -> None:
    attacks = rungs(SETTING)
    settings = {
        name: (
            (a.estimator.clip, a.loss) if isinstance(a, PGD) and isinstance(a.estimator, NES)
            else (a.space, a.loss, a.zscore, a.antithetic, a.sign_step)  # type: ignore[attr-defined]
        )
        for name, a in attacks.items()
    }  # fmt: skip
    assert settings == {
        "QL": ("none", cross_entropy),
        "+CLIP": ("ball", cross_entropy),
        "+loss": ("ball", hinge),
        "-PGD": ("pixel", hinge, False, True, False),
        "+tanh": ("tanh", hinge, False, True, False),
        "+zscore": ("tanh", hinge, True, True, False),
        "NATTACK": ("tanh", hinge, True, False, False),
        "QL+tanh+CLIP": ("tanh", cross_entropy, False, True, True),
        "QL, its own sigma": ("none", cross_entropy),
        RELEASED: ("tanh", "released", True, False, False),
    }


def test_the_table_is_complete_and_goes_on_where_it_stopped(model: nn.Module, tmp_path: Path) -> None:
    counted, data = Counted(model).eval(), Digits(batch_size=64, max_test=12)
    lines = climb(counted, data, SETTING, tmp_path, scale=50)
    assert [line.name for line in lines] == [*CHANGES, "NATTACK, logits x 50", f"{RELEASED}, logits x 50"]
    for line in lines:
        assert line.summary.images == 12
        assert line.summary.attacked > 6
        assert line.summary.total_queries <= 130 * 12
        assert line.queries == (10 if "NATTACK" in line.name else 20)
    assert lines[0].test is None
    assert all(line.test is not None for line in lines[1:-2])
    assert max(line.summary.successes for line in lines) > 0
    before = sum(counted._asked)
    again = climb(counted, data, SETTING, tmp_path, scale=50)
    assert sum(counted._asked) - before <= 12 * 12 * 2  # the clean images alone, once for each line
    assert [line.cells() for line in again] == [line.cells() for line in lines]
    paths = written(lines, ["a remark"], tmp_path)
    with (tmp_path / "ladder.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["attack"] for row in rows] == [line.name for line in lines]
    assert all(path.exists() for path in paths)
    text = (tmp_path / "ladder.md").read_text()
    assert text.startswith("a remark\n\n| attack |")
    assert text.count("\n| ") == len(lines) + 2


def test_multiplied_logits_decide_alike(model: nn.Module) -> None:
    x = torch.rand(20, 1, 8, 8)
    assert torch.equal(Scaled(model, 50.0)(x).argmax(1), model(x).argmax(1))
    torch.testing.assert_close(Scaled(model, 50.0)(x), 50 * model(x))


def test_the_command(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("lit_adv.experiments.ladder.Checkpoint", lambda _: model)
    words = ["--checkpoint", "net.ckpt", "--data", "digits", "--images", "4", "--budget", "30", "--directions", "5"]
    main([*words, "--eps", "1/4", "--step_size", "0.04", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert "net.ckpt on digits" in said
    assert "eta 0.04, sigma 0.1, N 5 and 30 queries an image everywhere; linf 0.25, shrink 0.1" in said
    assert all(name in said for name in CHANGES)
    assert (tmp_path / "ladder.md").exists()
    assert (tmp_path / "ladder.csv").exists()
