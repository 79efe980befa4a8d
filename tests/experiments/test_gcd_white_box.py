"""The white-box experiment on GCD: its arithmetic against plain loops, its attacks, and a tiny run to its end."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_adv.archive import configuration
from lit_adv.attacks import DDN, PGD, CarliniWagner, HopSkipJump
from lit_adv.datamodules import Batch, Digits, ImageDataModule
from lit_adv.defenses import GuidedComplementary
from lit_adv.detectors import ImageDetector, SensitivityDetector
from lit_adv.experiments import gcd_white_box_alarms as experiment
from lit_adv.experiments.gcd_setup import ATTACKERS, Setup
from lit_adv.experiments.gcd_white_box import further, main, measured, remade, ways
from lit_adv.experiments.gcd_white_box_alarms import on_alarms, refuses
from lit_adv.experiments.gcd_white_box_probes import probed
from lit_adv.experiments.gcd_white_box_table import Result, lines_page, nearest, rate, robust_page, table_page
from lit_adv.experiments.starts import OtherImages
from lit_adv.losses import Combined
from lit_adv.metrics import Records
from lit_adv.metrics.summary import wilson
from lit_adv.models import DigitsNet
from lit_adv.oracle import QueryOracle
from lit_adv.protocol import Protocol
from lit_adv.tables import interval
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial


class Biased(nn.Module):
    """Two logits whose difference is a fixed linear function of what is seen, ``offset`` higher."""

    def __init__(self, offset: float, slope: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(slope * torch.randn(64, generator=torch.Generator().manual_seed(3)))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        difference = x.flatten(1) @ self.weight.to(x.dtype) + self.offset
        return torch.stack([torch.zeros_like(difference), difference], 1)


def digits(count: int) -> Batch:
    data = Digits()
    return data.dataset("test").__getitems__(range(count))


@cache
def base() -> DigitsNet:
    """A network that has learnt the digits a little."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DigitsNet(image_size=8, filters=(4, 8), hidden=16)
        train = Digits().training_images(200)
        optimizer = torch.optim.Adam(net.parameters(), 0.03)
        for _ in range(25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(train.image), train.label).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval()


def guarded(net: DigitsNet, offset: float = 0.0) -> GuidedComplementary:
    """Detectors that know nothing, and refuse a quarter of all images."""
    of_map = SensitivityDetector(net, Biased(-0.5, 0.02), scaling="none")
    model = GuidedComplementary(net, ImageDetector(net, Biased(offset, 0.7)), of_map).eval()
    return model if offset else model.variant(threshold=float(model.margin(digits(80).image).quantile(0.75)))


@dataclasses.dataclass(frozen=True)
class Tiny(Setup):
    """Digits, an untrained pair of detectors, attacks of few steps."""

    @property
    def module(self) -> Callable[..., ImageDataModule]:
        return lambda **arguments: Digits(**{**arguments, "val_split": 0.2})

    @property
    def base(self) -> nn.Module:
        return base()

    def defence(self, attackers: Sequence[str], **settings: Any) -> GuidedComplementary:
        return guarded(base())

    def protocol(self, attacker: str, **changes: Any) -> Protocol:
        few = {"steps": 3} if ATTACKERS[attacker].config in ("pgd_linf", "ddn_l2", "deepfool_l2") else {}
        if attacker.startswith("CW"):
            few = {"iterations": 3, "search_steps": 2}
        found = _protocol(attacker)
        attack = remade(found.attack, **few, **changes.pop("attack", {}))
        return dataclasses.replace(found, attack=attack, **changes)


@cache
def _protocol(attacker: str) -> Protocol:
    return Setup().protocol(attacker)


def given(folder: Path, **changes: Any) -> argparse.Namespace:
    fixed = {
        "images": 6, "query_images": 3, "queries": 16, "detectors": ["own", "pooled"], "betas": [0.1, 1.0],
        "columns": ["additive", "product2"], "extras": ["from_image", "transfer", "black_box"], "audit": 0,
        "attackers": list(ATTACKERS), "folder": folder,
    }  # fmt: skip
    return argparse.Namespace(**{**fixed, **changes})


def records(verified: dict[int, bool], l2: dict[int, float] | None = None) -> Records:
    index = torch.tensor(sorted(verified), dtype=torch.int64)
    columns: dict[str, Any] = {name: torch.zeros(len(index)) for name in Records.empty().columns()}
    hit = torch.tensor([verified[i] for i in index.tolist()], dtype=torch.bool)
    far = torch.tensor([(l2 or {}).get(i, 1.0) for i in index.tolist()], dtype=torch.float64)
    return Records(
        **{**columns, "index": index, "clean_correct": hit | True, "verified": hit, "l2": far, "linf": far / 4}
    )


def result(form: str, found: Records, alarms: Records, model: str = "GCD", detectors: str = "own") -> Result:
    right = torch.tensor([True, True, True, False, True, True])
    refused = torch.tensor([False, False, False, False, True, True])
    return Result(detectors, "DDN-U", model, "DDN-U", form, found, alarms, right, refused)


def test_success_counts_refused_clean_images_and_robust_accuracy_calls_them_errors() -> None:
    """Of six images one is wrong, two are refused when clean; the ways break 0 and 1, and of the refused ones 4."""
    wrong = dataclasses.replace(records({3: False}), clean_correct=torch.tensor([False]))
    first = Records.cat([records({0: True, 1: False, 2: False}, {0: 1.5}), wrong])
    second = Records.cat([records({0: False, 1: True, 2: False}, {1: 4.0}), wrong])
    ways = [
        result("direct", first, records({4: True, 5: False})),
        result("beta 1", second, records({4: False, 5: False})),
    ]
    assert rate(ways[:1]) == (2, 5)
    assert rate(ways[1:]) == (1, 5)
    assert rate(ways) == (3, 5)
    near = nearest(ways)
    assert near.tolist() == [1.5, 4.0, inf, 1.0, inf]
    row = dict(zip(*((page := robust_page(ways, {}, 0.3)).heads, page.rows[0]), strict=True))
    assert row["right and not refused when clean, %"] == "50.0"
    assert row["L2 1: not broken by these ways, %"].startswith("50.0 ")  # the nearest success lies at 1.5
    assert row["L2 2: not broken by these ways, %"].startswith("33.3 ")
    assert row["L2 inf: not broken by these ways, %"] == f"16.7 {interval(wilson(1, 6))}"
    assert row["linf 0.3: not broken by these ways, %"] == ""  # no way of this norm
    table = table_page(ways, {}, [], "mnist")
    cells = dict(zip(table.heads, table.rows[0], strict=True))
    assert (cells["GCD direct"], cells["GCD eq. 14"], cells["GCD every way"]) == ("40.0", "20.0 (beta 1)", "60.0")
    assert (cells["paper: NoDET"], cells["paper: DET_IS"], cells["paper: GCD"]) == ("100.0", "0.4", "94.1")


def test_what_the_audit_broke_counts_as_broken_and_pooled_networks_stand_first() -> None:
    tried = records({0: False, 1: False, 2: False})
    alarms = records({4: False, 5: False})
    own = dataclasses.replace(result("direct", tried, alarms), norm="linf", eps=0.3)
    pooled = dataclasses.replace(own, detectors="pooled", group="all")
    near, far = records({0: True, 1: False}, {0: 1.0}), records({1: True}, {1: 2.0})  # linf is a quarter
    page = robust_page([own, pooled], {}, 0.3, {("own", "DDN-U", "GCD"): [near, far], ("pooled", "all", "GCD"): []})
    first, second = (dict(zip(page.heads, row, strict=True)) for row in page.rows)
    assert (first["detectors"], second["detectors"]) == ("pooled", "own")
    head = "linf 0.3: not broken by these ways, %"
    assert first[head] == f"50.0 {interval(wilson(3, 6))}"
    assert second[head] == f"33.3 {interval(wilson(2, 6))}"  # the second probe broke beyond 0.3
    assert [row["images probed by the audit"] for row in (first, second)] == ["", "2"]
    assert all(row[f"L2 {radius}: not broken by these ways, %"] == "" for row in (first, second) for radius in (1, 2))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ((2, 1, 0), "40.0 (beta 0.1, lower edge)"), ((1, 2, 1), "40.0 (beta 1)"),
        ((1, 2, 2), "40.0 (beta 1, 10, upper edge)"),
        ((0, 0, 0), "0.0 (every beta)"),
    ],
)  # fmt: skip
def test_the_best_weight_is_told_with_its_ties_and_edges(broken: tuple[int, ...], said: str) -> None:
    alarms = records({4: False, 5: False})
    ways = [
        result(f"beta {beta}", records({i: i < count for i in range(3)}), alarms)
        for beta, count in zip((0.1, 1, 10), broken, strict=True)
    ]
    cells = dict(zip((page := table_page(ways, {}, [], "mnist")).heads, page.rows[0], strict=True))
    assert cells["GCD eq. 14"] == said


def test_the_papers_distance_stands_beside_many_successes_alone() -> None:
    none, right = Records.empty(), torch.ones(12, dtype=torch.bool)
    for count, paper in ((10, "10.252"), (9, "")):
        found = records({i: i < count for i in range(12)})
        way = Result("own", "DDN-U", "GCD", "DDN-U", "beta 1", found, none, right, ~right)
        page = lines_page([way], {}, [], "mnist")
        cells = dict(zip(page.heads, page.rows[0], strict=True))
        assert (cells["successes"], cells["paper: mean L2"]) == (str(count), paper)


def test_attackers_follow_equation_14_with_every_weight(tmp_path: Path) -> None:
    setup, flags = Tiny(), given(tmp_path, betas=[0.1, 10.0])
    forms = {name: [line.form for line in ways(setup, flags, name)] for name in ATTACKERS}
    both = ["direct", "beta 0.1", "beta 10"]
    for name in ("FGSM-U", "CW-U", "DDN-U"):
        assert forms[name] == both
    begin = ["from the image", "from the image, beta 0.1", "from the image, beta 10"]
    assert forms["PGD-U"] == [*both, *begin]
    assert forms["PGD-T"] == [*both, *begin, "product2"]
    assert forms["DFool-U"] == ["direct"]
    assert forms["CW-T"] == forms["DDN-T"] == [*both, "product2"]
    attacks = {line.protocol.name: line.protocol for name in ATTACKERS for line in ways(setup, flags, name)}
    pgd, ddn, cw = (attacks[f"{name}_beta10"].attack for name in ("pgd-u", "ddn-u", "cw-u"))
    assert isinstance(pgd, PGD)
    assert isinstance(ddn, DDN)
    assert isinstance(cw, CarliniWagner)
    assert pgd.loss == ddn.loss == Combined(10.0)
    assert (cw.beta, cw.kappa) == (10.0, 0.01)
    assert pgd.stop_at_hit
    assert pgd.threat == ThreatModel("linf", 0.3)
    assert all(p.attack.threat.norm == ("linf" if "pgd" in n or "fgsm" in n else "l2") for n, p in attacks.items())
    assert [line.protocol.name for line in further(setup, flags, OtherImages(*digits(4)[:2]), "transfer")] == [
        "transfer_kappa0", "transfer_kappa5", "transfer_kappa10",
    ]  # fmt: skip


def test_ddn_counts_an_image_only_if_it_is_misclassified_and_not_refused() -> None:
    net, batch = base(), digits(30)
    model = guarded(net)
    right = (net(batch.image).argmax(1) == batch.label) & ~refuses(model, batch.image)
    x, y = batch.image[right][:8], batch.label[right][:8]
    attack = DDN(ThreatModel("l2", "inf", levels=255), steps=20, loss=Combined(1.0))
    found = attack(QueryOracle(model, len(x)), x, y)
    assert found.success.any()
    for row in found.success.nonzero().squeeze(1).tolist():
        image = found.x_adv[row : row + 1]
        assert int(net(image).argmax()) != int(y[row])
        assert float(model.margin(image)) <= model.threshold
    closed = guarded(net, offset=1e4)  # refuses everything, whatever the classes
    stuck = attack(QueryOracle(closed, len(x)), x, y)
    assert not stuck.success.any()


def test_beginnings_are_the_nearest_images_of_another_class() -> None:
    known, batch = digits(60), digits(5)
    starts = OtherImages(known.image, known.label)
    target = (batch.label + 3) % 10
    for wanted in (None, target):
        found = starts(batch.image, batch.label, wanted)
        for row in range(5):
            best, least = -1, inf
            for place in range(60):
                label = int(known.label[place])
                allowed = label != int(batch.label[row]) if wanted is None else label == int(wanted[row])
                far = float((known.image[place] - batch.image[row]).norm())
                if allowed and far < least:
                    best, least = place, far
            assert torch.equal(found[row], known.image[best])


def test_records_tell_where_an_attack_began() -> None:
    known = digits(20)
    starts = OtherImages(known.image, known.label)
    told = configuration(HopSkipJump(ThreatModel("l2", "inf"), starts=starts))["init_args"]["starts"]
    assert told["class_path"] == "lit_adv.experiments.starts.OtherImages"
    again, fewer = OtherImages(known.image, known.label), OtherImages(known.image[:19], known.label[:19])
    others = OtherImages(known.image, known.label.flip(0))
    assert told == configuration(again)
    assert len({starts.known_by, fewer.known_by, others.known_by}) == 3


def test_images_refused_when_clean_are_attacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch = base(), digits(60)
    model = guarded(net)
    missed = (net(batch.image).argmax(1) == batch.label) & refuses(model, batch.image)
    assert 2 <= int(missed.sum()) < 50
    part = Batch(*(column[missed][:5] for column in batch))
    attack = DDN(steps=10, initial=0.5)
    protocol = Protocol(name="ddn", attack=attack, target="random")
    found = on_alarms(model, protocol, part, tmp_path)
    assert sorted(found.index.tolist()) == sorted(part.index.tolist())
    trial = Trial(protocol, net)  # of the classifier alone, to which they are images as others
    trial.add(part)
    alone = trial.close().unique()
    assert torch.equal(found.target, alone.target)
    target = {int(i): int(t) for i, t in zip(found.index, found.target, strict=True)}
    aims = torch.tensor([target[i] for i in part.index.tolist()])
    again = attack(QueryOracle(model, len(aims), known_right=True), part.image, part.label, aims, part.index)
    won = dict(zip(part.index.tolist(), (model(again.x_adv).argmax(1) == aims).tolist(), strict=True))
    assert {int(i): bool(v) for i, v in zip(found.index, found.verified, strict=True)} == won
    monkeypatch.setattr(experiment, "_attack_all", None)  # nothing is attacked twice
    assert on_alarms(model, protocol, part, tmp_path).rows() == found.rows()
    nothing = Batch(*(column[:0] for column in part))
    assert len(on_alarms(model, protocol, nothing, tmp_path / "none")) == 0
    assert not (tmp_path / "none").exists()


def test_a_tiny_run_comes_to_its_end_and_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = Tiny()
    flags = given(tmp_path, attackers=["CW-U", "DDN-T"], betas=[1.0], images=4, query_images=2)
    files = measured(setup, flags)
    names = {path.name for path in files}
    part = "cw-u_ddn-t"
    pages = {f"table3_{part}.md", f"table3_{part}.csv", f"lines_{part}.md", f"robust_{part}.md"}
    assert {*pages, "cw-u_own.png", "ddn-t_pooled.png"} <= names
    table = (tmp_path / setup.tag / f"table3_{part}.md").read_text()
    lines = (tmp_path / setup.tag / f"lines_{part}.md").read_text()
    assert all(f"* {word}" in lines for word in ("square: ", "nattack: ", "hopskipjump: ", "transfer_kappa5: "))
    for words in (
        "| own | CW-U |",
        "| pooled | DDN-T |",
        "transfer, kappa 10",
        "| pooled | HopSkipJump |",
        "paper: GCD",
        "detectors' epochs as configured",
        "own (CW-U) ",
    ):
        assert words in table
    shown = capsys.readouterr().out
    before = sorted(path for path in tmp_path.rglob("rank0.jsonl"))
    sizes = [path.stat().st_size for path in before]
    measured(setup, flags)
    assert capsys.readouterr().out == shown
    assert [path.stat().st_size for path in sorted(tmp_path.rglob("rank0.jsonl"))] == sizes


def test_sizes_that_are_no_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--queries must be at least 1, got 0"):
        measured(Tiny(), given(tmp_path, queries=0))


def test_a_run_of_a_part_leaves_the_pages_of_the_whole(tmp_path: Path) -> None:
    setup = Tiny()
    fixed: dict[str, Any] = {"betas": [], "images": 2, "query_images": 1, "extras": [], "columns": ["additive"]}
    whole = {path.name for path in measured(setup, given(tmp_path, **fixed))}
    assert {"table3.md", "lines.md", "robust.md"} <= whole
    kept = (tmp_path / setup.tag / "table3.md").read_text()
    for detectors, attackers, stem in (
        (["pooled"], list(ATTACKERS), "table3_pooled.md"),
        (["own"], ["DDN-U", "FGSM-U"], "table3_own_fgsm-u_ddn-u.md"),
    ):
        flags = given(tmp_path, detectors=detectors, attackers=attackers, **fixed)
        assert stem in {path.name for path in measured(setup, flags)}
    assert (tmp_path / setup.tag / "table3.md").read_text() == kept


def test_the_audits_records_of_this_network_are_found(tmp_path: Path) -> None:
    net, batch = base(), digits(12)
    model = guarded(net)
    protocol = Protocol(name="linf_0.3_pgd10", attack=PGD(ThreatModel("linf", 0.3), 5))
    trial = Trial(protocol, model, dirpath=tmp_path)
    trial.add(batch)
    made = trial.close().unique()
    (found,) = probed(tmp_path, model, batch)
    assert found.index.tolist() == made.index.tolist()
    assert torch.equal(found.verified, made.verified)
    moved = Batch(1 - batch.image, batch.label, batch.index)
    assert probed(tmp_path, model, moved) == []  # other images under the same places
    assert probed(tmp_path, model.variant(threshold=9.0), batch) == []  # another network


@pytest.mark.parametrize(
    "flags", [["--images", "0"], ["--queries", "-2"], ["--audit", "-1"], ["--betas", "1", "nan"], ["--betas", "-1"]]
)
def test_bad_numbers_end_in_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert f"argument {flags[0]}: must be finite and at least" in capsys.readouterr().err
