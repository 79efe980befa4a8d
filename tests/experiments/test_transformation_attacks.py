"""The table of attacks on f_a(g(x)): its arithmetic, its measures against plain loops, and a tiny run to its end."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contracts.nets import SHAPE, Linear, Small, decided, images
from defenses.behind_g import DELTA, defended, linear_reference
from torch import Tensor, nn

from lit_adv.attacks import PGD, Transfer
from lit_adv.datamodules import Batch
from lit_adv.defenses import AdversarialTransformation
from lit_adv.draws import Draws
from lit_adv.estimators import Autograd
from lit_adv.experiments import transformation_attacks as experiment
from lit_adv.experiments.transformation_attacks import (
    Line,
    cells,
    clean_row,
    lines,
    measured,
    parsed,
    shares,
    unattacked,
    worst,
    wrong_shares,
)
from lit_adv.experiments.transformation_measures import agreement, ascent, imitation
from lit_adv.metrics import Records
from lit_adv.models import Reparameterisation
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial

WORDS = (
    "--images 4 --query_images 2 --queries 12 --eot 2 --draws 3 --confirm 3 --query_confirm 3 --steps 2 "
    "--large_eps 0.4 --large_images 2 --curve_images 2 --curve_steps 2 --audit 0"
)


def networks() -> dict[str, nn.Module]:
    """Tiny networks of one kind and type, in eval mode."""
    f_a = AdversarialTransformation(Small(4, SHAPE), linear_reference(), delta=DELTA, num_classes=4)
    sibling = AdversarialTransformation(
        Small(4, SHAPE, seed=8), linear_reference(), delta=DELTA, steps=2, num_classes=4
    )
    h = Reparameterisation(nn.Conv2d(3, 3, 1), DELTA)
    others = {name: Small(4, SHAPE, seed) for seed, name in enumerate(("model_a", "model_b", "model_a_narrow"))}
    found: dict[str, nn.Module] = {"f_a": f_a, "f_a_n2": sibling, "h": h, **others}
    return {name: network.float().eval() for name, network in found.items()}


def given(folder: Path, *words: str) -> argparse.Namespace:
    return parsed([*WORDS.split(), "--folder", str(folder), *words])


def records(wrong: list[float], right: list[bool], first: int = 0) -> Records:
    count = len(wrong)
    zero, share = torch.zeros(count, dtype=torch.int64), torch.tensor(wrong)
    known = {field.name: zero for field in dataclasses.fields(Records)}
    known |= {"index": first + torch.arange(count), "clean_correct": torch.tensor(right)}
    known |= {"verified_mean": share, "verified_any": share > 0, "verified": share > 0.5}
    return Records(**known)


def test_shares_are_those_of_all_outcomes() -> None:
    """Over every combination of draws of three independent images, weighted by its probability."""
    wrong = [0.0, 0.25, 0.6]
    mean = square = 0.0
    for mask in range(8):
        lost = [bool(mask >> place & 1) for place in range(3)]
        weight = math.prod(p if gone else 1 - p for p, gone in zip(wrong, lost, strict=True))
        accuracy = 1 - sum(lost) / 3
        mean, square = mean + weight * accuracy, square + weight * accuracy**2
    count, over, majority, span, every = shares(torch.tensor(wrong, dtype=torch.float64))
    assert (count, majority, every) == ("3", "66.7 %", "33.3 %")
    assert over == f"{100 * mean:.1f} ± {100 * math.sqrt(square - mean**2):.1f} %"
    z = 1.959964
    low, high = ((2 / 3 + z * z / 6 + s * z * math.sqrt(2 / 27 + z * z / 36)) / (1 + z * z / 3) for s in (-1, 1))
    assert span == f"[{100 * low:.1f}, {100 * high:.1f}]"


def test_worst_case_is_taken_per_image_over_those_who_saw_it() -> None:
    parts = [records([0.2, 0.9, 0.0, 0.1], [True, True, True, False]), records([0.7, 0.0], [True, True])]
    clean = torch.tensor([0.0, 0.0, 0.3, 0.2])  # an attack that does worse than none is not made
    row = worst(parts, clean, torch.arange(4), 0.1, partly=True)
    expected = shares(torch.tensor([0.7, 0.9, 0.3, 1.0], dtype=torch.float64))
    assert row[3:8] == expected
    assert row[:3] == ["f_a(g)", "worst case per image over 2 attacks, those by queries on some images", "0.1"]
    one = worst(parts, clean, torch.arange(2), 0.1, partly=False)
    assert one[3:8] == shares(torch.tensor([0.7, 0.9], dtype=torch.float64))
    assert float(one[4].split()[0]) <= min(100 * (1 - p.verified_mean[:2].mean().item()) for p in parts) + 0.05
    assert wrong_shares(parts[0], clean).tolist() == pytest.approx([0.2, 0.9, 0.3, 1.0])


def test_a_tie_of_draws_is_not_a_majority() -> None:
    assert shares(torch.tensor([0.5, 0.4], dtype=torch.float64))[2] == "50.0 %"


def test_defaults_are_those_that_were_agreed() -> None:
    plain = parsed([])
    assert (plain.images, plain.query_images, plain.queries, plain.eot, plain.draws) == (100, 50, 1000, 8, 30)
    assert plain.large_eps[0] >= 0.3


def test_lines_are_all_attacks_at_one_radius(tmp_path: Path) -> None:
    found = {line.protocol.name: line for line in lines(networks(), given(tmp_path)) if line.model == "f_a(g)"}
    assert list(found) == [
        "transfer_from_model_a", "transfer_from_model_b", "transfer_from_model_a_narrow", "reparameterisation",
        "mean_start", "white_box_transfer", "bpda_identity", "small_n_transfer", "unrolled", "bpda_softsign",
        "bpda_tanh", "bpda_softsign_scaled", "bpda_tanh_scaled", "hop_skip_jump", "gen_attack", "nattack",
        "bpda_identity_eps0.4",
    ]  # fmt: skip
    for line in found.values():
        assert not line.counts or line.protocol.attack.threat == ThreatModel("linf", 0.1)
    assert [name for name, line in found.items() if not line.counts] == ["mean_start", "bpda_identity_eps0.4"]
    surrogates = {name: line.protocol.surrogate for name, line in found.items() if line.protocol.surrogate}
    assert surrogates == {
        "white_box_transfer": "classifier", "unrolled": "unrolled", "bpda_softsign": "softsign", "bpda_tanh": "tanh",
        "bpda_softsign_scaled": "softsign_scaled", "bpda_tanh_scaled": "tanh_scaled",
    }  # fmt: skip
    identity, sibling = found["bpda_identity"].protocol.attack, found["small_n_transfer"].protocol.attack
    assert isinstance(identity, PGD)
    assert isinstance(sibling, Transfer)
    assert (identity.estimator, identity.steps, identity.stop_at_hit) == (Autograd(2), 2, True)
    assert sibling.surrogate == "softsign"
    for name in ("hop_skip_jump", "gen_attack", "nattack"):
        assert (found[name].protocol.budget, found[name].protocol.max_samples) == (12, 2)


def test_clean_line_counts_fresh_draws(tmp_path: Path) -> None:
    model, x = networks()["f_a"], images(4, dtype=torch.float32)
    y = decided(model, x)
    row = clean_row("f_a(g)", unattacked(model, Batch(x, y, torch.arange(4)), given(tmp_path)))
    lost = 0
    for number in range(3):
        with torch.no_grad():
            answer = model(x, draws=Draws(0, torch.arange(4), torch.full((4,), number), -2))
        lost += int((answer.argmax(1) != y).sum())
    assert row[4].startswith(f"{100 * (1 - lost / 12):.1f} ±")
    assert row[-1] == "82.9"


def test_a_tiny_run_ends_and_the_next_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets, x = networks(), images(4, dtype=torch.float32)
    batch = Batch(x, decided(nets["f_a"].classifier, x), torch.arange(4))  # type: ignore[arg-type]
    only = ["--only", "bpda_identity", "transfer_from_model_a", "mean_start", "pgd"]
    flags = given(tmp_path, *only)
    page = measured(nets, batch, batch, flags)
    table = {(row[0], row[1]): dict(zip(page.heads, row, strict=True)) for row in page.rows}
    identity = table["f_a(g)", "bpda_identity"]
    assert (identity["images"], identity["eps"]) == ("4", "0.1")
    assert identity["paper (CIFAR-10, eps 0.031)"].startswith("80.2")
    assert table["model_a", "pgd"]["paper (CIFAR-10, eps 0.031)"].startswith("0.0")
    assert table["model_a_narrow", "pgd"]["paper (CIFAR-10, eps 0.031)"].startswith("42.7")
    assert table["f_a(g)", "transfer_from_model_a"]["source fooled"].endswith("%")
    far = table["f_a(g)", "mean_start (invalid by construction)"]
    assert far["eps"] == "box"
    assert float(far["mean linf"]) > 0.1
    for told in ("Delta 0.2", "N 13", "least_likely", "random start True", "box False", "S 2", "2 steps"):
        assert told in str(page)
    assert "masking gradients" in str(page)
    assert [note.partition(" on ")[0] for note in page.notes].count("imitation of g") == 2
    assert sum(note.startswith("cosine of the gradients") for note in page.notes) == 4
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"

    def no_more(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(PGD, "__call__", no_more)
    monkeypatch.setattr("lit_adv.experiments.transformation_measures.imitation", no_more)
    monkeypatch.setattr("lit_adv.experiments.transformation_measures.ascent", no_more)
    assert str(measured(nets, batch, batch, flags)) == str(page)


def test_attacks_by_queries_and_the_audit_read_the_same_records(tmp_path: Path) -> None:
    nets, x = networks(), images(4, dtype=torch.float32)
    batch = Batch(x, decided(nets["f_a"].classifier, x), torch.arange(4))  # type: ignore[arg-type]
    flags = given(tmp_path, "--only", "nattack", "--audit", "1")
    page = measured(nets, batch, batch, flags)
    (row,) = (row for row in page.rows if row[1] == "nattack")
    assert row[3] == "2"
    assert 0 < float(row[-2]) <= 12
    assert any(note.startswith("audit: ") for note in page.notes)


def test_lines_tell_what_the_source_thought(tmp_path: Path) -> None:
    nets, x = networks(), images(4, dtype=torch.float32)
    (line,) = (line for line in lines(nets, given(tmp_path)) if line.protocol.name == "transfer_from_model_b")
    trial = Trial(line.protocol, nets["f_a"], dirpath=tmp_path)
    trial.add(Batch(x, decided(nets["model_b"], x), torch.arange(4)))
    outcome = trial.outcome(trial.close())
    told = dict(zip(experiment.HEADS, cells(line, outcome, torch.zeros(4)), strict=True))
    fooled, tried = outcome.counts["images fooled the local models"]
    assert told["source fooled"] == f"{100 * fooled / tried:.1f} %"
    assert isinstance(line, Line)


# what g does, what is learnt of it, and how the loss rises


def test_imitation_errors_of_uniform_noise_are_known() -> None:
    """g adds U[-D, D]: its variance is D^2 / 3, its mean x, and h(x) = x + c errs by c^2 more."""

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1

    x = images(20)
    found = imitation(Shifted(), defended(mode="noise"), x, torch.arange(20), 40)
    variance = DELTA**2 / 3
    assert found.least == pytest.approx(variance, rel=0.02)
    assert found.image == pytest.approx(variance, rel=0.02)
    assert found.network == pytest.approx(variance + 0.01, rel=0.02)
    assert found.mean == pytest.approx(variance * (1 + 1 / 40), rel=0.02)
    assert found.shift == pytest.approx(math.sqrt(variance / 40) * math.sqrt(2 / math.pi), rel=0.05)
    assert found.largest <= DELTA
    with pytest.raises(ValueError, match="draws must be at least 2"):
        imitation(Shifted(), defended(), x, torch.arange(20), 1)


def test_ascent_on_a_linear_classifier_is_a_plain_loop() -> None:
    model, x = Linear(3), images(5)
    y = decided(model, x)
    found = ascent(model, x, y, ThreatModel("linf", 0.1), 4, 0.04)
    at = x.clone()
    for step in range(5):
        with torch.no_grad():
            scores = model(at)
        assert found.loss[step] == pytest.approx(F.cross_entropy(scores, y).item())
        assert found.wrong[step] == pytest.approx((scores.argmax(1) != y).double().mean().item())
        slope = (scores.softmax(1) - F.one_hot(y, 3)) @ model.weight.detach()
        at = (at + 0.04 * slope.sign().view_as(at)).clamp(x - 0.1, x + 0.1).clamp(0, 1)


def test_unrolled_gradients_agree_with_those_of_the_identity() -> None:
    model, x = defended(), images(3)
    y = decided(model.classifier, x)
    assert agreement(model, x, y, "unrolled", (1, 3)) == pytest.approx([1.0, 1.0])
    for value in agreement(model, x, y, "softsign_scaled", (1, 2)):
        assert -1 <= value <= 1
