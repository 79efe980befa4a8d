"""The experiment keeps its bounds on a few digits, and misses them where an attack does depend on its batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contracts.nets import Small, decided, images

from lit_adv.attack import Search, State
from lit_adv.attacks import PGD, NAttack
from lit_adv.datamodules import Batch
from lit_adv.experiments.invariance import Comparison, Setting, attacked, compared, main
from lit_adv.protocol import Protocol
from lit_adv.threat import ThreatModel

WEAK = ThreatModel(eps=0.008)
X = images(20)
DATA = Batch(X, decided(Small(), X), torch.arange(100, 120))
KEPT = Comparison("pgd", Setting(), 500, 100, 100, 1.0, True, 0.0, 0.0, 7, 7)


def pair(attack: PGD | NAttack) -> Comparison:
    """Batches of 3 beside batches of 20, on one process."""
    protocol = Protocol(name="a", attack=attack)
    one, other = attacked(Small().eval(), DATA, [(protocol, Setting(batch=20)), (protocol, Setting(batch=3))])
    return compared("a", Setting(batch=3), other, one)


@pytest.mark.parametrize("attack", [PGD(WEAK, steps=3), NAttack(WEAK, steps=2, samples=10)], ids=["pgd", "nattack"])
def test_attacks_that_keep_rows_apart_keep_the_bounds(attack: PGD | NAttack) -> None:
    found = pair(attack)
    assert found.images == 20
    assert found.draws == found.calls >= 20
    assert found.holds(torch.float64)
    assert found.holds(torch.float32)


def test_random_numbers_of_the_batch_are_found_out() -> None:
    """An attack that keys its numbers by the place in the pool instead of the image."""

    class ByPlace(PGD):
        def start(self, search: Search, rows: torch.Tensor) -> Any:
            search.index = torch.arange(len(search.index))
            return super().start(search, rows)

    assert not pair(ByPlace(WEAK, steps=3)).holds(torch.float64)
    assert not pair(ByPlace(WEAK, steps=3)).holds(torch.float32)


def test_gradients_shared_by_the_batch_are_found_out() -> None:
    class Shared(PGD):
        def step(self, search: Search, state: State) -> State:
            state = super().step(search, state)
            state.x = self.threat.project(state.x + 1e-4 * (state.x - state.x.mean(0)), state.x0)
            return state

    found = pair(Shared(WEAK, steps=3))
    assert found.draws == found.calls
    assert found.pixels > 0.01
    assert found.furthest > 1e-9
    assert not found.holds(torch.float64)


@pytest.mark.parametrize(
    ("change", "float64", "float32"),
    [
        ({}, True, True),
        ({"furthest": 2e-9, "pixels": 0.5}, False, True),
        ({"records": False}, False, True),
        ({"robust": 101, "success": 0.99, "records": False}, False, True),
        ({"robust": 102, "records": False}, False, False),
        ({"success": 0.989, "records": False}, False, False),
        ({"draws": 6}, False, False),
        ({"draws": 0, "calls": 0}, False, False),
    ],
)
def test_bounds(change: dict[str, Any], float64: bool, float32: bool) -> None:
    found = replace(KEPT, **change)
    assert found.holds(torch.float64) is float64
    assert found.holds(torch.float32) is float32


def test_the_experiment_on_a_few_digits(capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes are really two: they are spawned and join their records by gloo."""
    assert main(["--images", "40", "--alone", "5", "--queries", "60"]) == 0
    said = capsys.readouterr().out
    assert "40 images of digits in float64, DigitsNet" in said
    assert said.count("kept") == 8
    assert "MISSED" not in said


def test_a_missed_bound_is_told_by_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [KEPT, replace(KEPT, attack="nattack", records=False)]
    monkeypatch.setattr("lit_adv.experiments.invariance.compare", lambda *_: broken)
    monkeypatch.setattr("lit_adv.experiments.invariance.trained", lambda *_: Small())
    assert main(["--images", "2"]) == 1
    said = capsys.readouterr().out
    assert said.count("MISSED") == said.count("kept") == 1
