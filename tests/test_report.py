"""The report says what its records say, and writes files that stand alone."""

from __future__ import annotations

import csv
import errno
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_adv.metrics import Records, mcnemar, wilson
from lit_adv.pictures import Examples
from lit_adv.report import Outcome, Report

CONFIG = {"class_path": "lit_adv.attacks.PGD", "init_args": {"steps": 10, "radius": math.inf, "seed": {1, 2}}}


def records(broken: list[int], wrong: tuple[int, ...] = (), n: int = 20, target: int = -1) -> Records:
    """Records of n images: these broken at cost 5 of 50, those wrong at first."""
    index = torch.arange(n)
    hit = torch.isin(index, torch.tensor(broken, dtype=torch.int64))
    right = ~torch.isin(index, torch.tensor(wrong, dtype=torch.int64))
    size = right.double() / 10
    return Records(
        index=index,
        label=index % 10,
        target=torch.full((n,), target),
        clean_correct=right,
        claimed=hit,
        verified=hit,
        verified_any=hit,
        verified_mean=hit.double(),
        rounded=hit,
        distance=torch.where(hit, size, math.inf),
        l2=size,
        linf=size,
        queries=torch.where(hit, 5, 50) * right,
        checks=right.long(),
        first_hit=torch.where(hit, 5, -1),
        iterations=torch.where(hit, 1, 10) * right,
    )


def outcome(name: str, rows: Records, access: str = "gradient", **others: Any) -> Outcome:
    values: dict[str, Any] = {"norm": "linf", "eps": 8 / 255, "budget": 50, "draws": 1, "config": CONFIG}
    return Outcome(name=name, records=rows, access=access, **{**values, **others})


def images(m: int = 3) -> Examples:
    numbers = torch.arange(m)
    x0 = torch.rand(m, 1, 8, 8)
    return Examples(numbers, numbers, numbers + 1, x0, (x0 + 0.1).clamp(0, 1))


@pytest.fixture
def report() -> Report:
    """PGD breaks 0 to 4, Square 4 to 9; 18 and 19 are wrong at first."""
    white = outcome("pgd", records([0, 1, 2, 3, 4], (18, 19)), examples=images(), seconds=1.5, notes=("two <starts>",))
    black = outcome("square/linf", records([4, 5, 6, 7, 8, 9], (18, 19)), "logits", budget=None)
    return Report([white, black], "net & co", "digits", {"date": "2026-03-01", "torch": torch.__version__})


def test_verdict_is_the_worst_case(report: Report) -> None:
    (verdict,) = report.verdicts
    interval = wilson(8, 20)
    assert interval is not None
    assert verdict.summary.robust_accuracy == 8 / 20
    assert verdict.sentence == (
        f"robust accuracy 40.0 % [{100 * interval.low:.1f}, {100 * interval.high:.1f}] against the worst of 2 attacks"
    )
    assert verdict.setting == "net & co, L∞ 8/255, 20 images"


def test_verdicts_keep_models_and_threats_apart() -> None:
    rows = records([0])
    outcomes = [
        outcome("pgd", rows),
        outcome("pgd", rows, model="other"),
        outcome("ddn", rows, norm="l2", eps=0.5),
        outcome("apgd", records([1])),
    ]
    report = Report(outcomes, "net", "digits")
    assert [(v.model, v.norm, v.attacks) for v in report.verdicts] == [
        ("net", "linf", ("pgd", "apgd")),
        ("other", "linf", ("pgd",)),
        ("net", "l2", ("ddn",)),
    ]
    assert report.labels == ["pgd on net", "pgd on other", "ddn on net", "apgd on net"]
    # Attacks under different threat models are not compared.
    pairs = {(c.first, c.second) for c in report.comparisons()}
    assert pairs == {("pgd on net", "pgd on other"), ("pgd on net", "apgd on net")}


def test_a_better_black_box_is_flagged(report: Report) -> None:
    (warning,) = report.warnings()
    assert "Gradients may be masked" in warning
    assert "square/linf leaves 60.0 %, pgd 65.0 % of the same 20 images" in warning
    assert report.remarks() == []


def test_no_flag_without_cause() -> None:
    strong, weak = records([0, 1, 2]), records([0])
    for white, black in (
        (outcome("pgd", strong), outcome("nes", weak, "probs")),
        (outcome("pgd", strong), outcome("nes", strong, "probs")),
        (outcome("pgd", weak), outcome("apgd", strong)),
        (outcome("pgd", weak), outcome("ddn", strong, "label", norm="l2")),
        (outcome("pgd", weak), outcome("nes", strong, "label", model="other")),
        (outcome("pgd", records([0], target=3)), outcome("nes", strong, "label")),  # targets are harder to reach
        (outcome("pgd", weak), outcome("nes", records([], n=0), "label")),
    ):
        assert Report([white, black], "net", "digits").warnings() == []


def test_black_box_alone_is_remarked() -> None:
    (remark,) = Report([outcome("nes", records([0]), "probs")], "net", "digits").remarks()
    assert "no attack saw gradients" in remark


def test_comparisons_are_mcnemar(report: Report) -> None:
    (comparison,) = report.comparisons()
    assert comparison.test == mcnemar(report.outcomes[0].records, report.outcomes[1].records)
    assert (comparison.test.b, comparison.test.c, comparison.test.n) == (4, 5, 18)


def test_text_holds_the_figures(report: Report) -> None:
    text = str(report)
    line = next(line for line in text.splitlines() if "pgd" in line)
    for figure in ("50", "20", "90.0", "65.0", "27.8", "35.0", "0.100"):
        assert figure in line.split() or f" {figure} " in line
    assert "worst of 2" in text
    assert "WARNING: net & co, L∞ 8/255: black box against white box: square/linf leaves" in text
    assert "pgd: two <starts>" in text
    assert "\x1b" not in text


def test_markdown_holds_a_line_per_attack_and_the_remarks(report: Report) -> None:
    title, _, _, _, white, black, worst, *rest = report.markdown().splitlines()
    assert title == "# net & co on digits, L\N{INFINITY} 8/255"
    assert [line[2:].split(" | ")[0] for line in (white, black, worst)] == ["pgd", "square/linf", "worst of 2"]
    assert "27.8 [12.5, 50.9]" in white
    assert "37.5" in white  # queries of all attacked: 5 of 18 at 5, the others at 50
    assert "37.5" not in worst
    text = "\n".join(rest)
    assert "* pgd: two <starts>" in text
    assert report.verdicts[0].sentence in text
    assert "Gradients may be masked" in text


def test_counts_are_in_the_json() -> None:
    counted = outcome("zoo", records([0]), "probs", counts={"estimates were 0": (3, 400)})
    (told,) = Report([counted], "net", "digits").as_dict()["outcomes"]
    assert told["counts"] == {"estimates were 0": {"happened": 3, "times": 400}}


def test_repeated_rows_count_once() -> None:
    rows = records([0])
    assert Report([outcome("pgd", Records.cat([rows, rows]))], "net", "digits").summaries[0].images == 20


def test_files_round_trip(report: Report, tmp_path: Path) -> None:
    paths = report.write(tmp_path / "deep" / "folder")
    assert list(paths) == ["records_pgd", "records_square-linf", "csv", "md", "json", "curves", "examples_pgd", "html"]
    assert sorted(path.name for path in paths["csv"].parent.iterdir()) == sorted(path.name for path in paths.values())
    with paths["records_square-linf"].open(newline="") as stream:
        read = Records.from_rows(list(csv.DictReader(stream)))
    assert read.pack().equal(report.outcomes[1].records.pack())
    with paths["csv"].open(newline="") as stream:
        first = next(csv.DictReader(stream))
    assert (first["name"], float(first["robust_accuracy"]), first["seconds"]) == ("pgd", 0.65, "1.5")
    assert float(first["robust_interval_low"]) == pytest.approx(wilson(13, 20).low)  # type: ignore[union-attr]


def test_json_is_strict(report: Report, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = report.write(tmp_path)["json"].read_text()
    assert json.loads(text, parse_constant=refuse) == report.as_dict()
    config = report.as_dict()["outcomes"][0]["config"]
    assert config["init_args"] == {"steps": 10, "radius": None, "seed": [1, 2]}


class Page(HTMLParser):
    """Collects what a page refers to, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_stands_alone(report: Report, tmp_path: Path) -> None:
    text = report.write(tmp_path)["html"].read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.links) == 2 + 3 * 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|url\(|@import", text)
    words = re.sub(r"<[^>]+>|\s+|&nbsp;", " ", text)
    for phrase in ("net &amp; co", "two &lt;starts&gt;", "65.0 [", "gradients may be masked", "McNemar"):
        assert phrase in words
    assert report.verdicts[0].sentence in words.replace("\N{NO-BREAK SPACE}", " ")


def test_page_of_a_random_model_and_of_nothing(tmp_path: Path) -> None:
    nothing = outcome("pgd", records([], n=0), draws=30, eps=math.inf, examples=images(0))
    text = Report([nothing], "net", "digits").write(tmp_path)["html"].read_text()
    assert "robust accuracy is undefined" in text
    assert "any draw" in text
    assert "No attack was run" in Report([], "net", "digits").write(tmp_path)["html"].read_text()


def test_names_that_collide_get_numbers(tmp_path: Path) -> None:
    rows = records([0])
    report = Report([outcome("pgd", rows), outcome("PGD", rows), outcome("../pgd", rows)], "net", "digits")
    paths = report.write(tmp_path)
    assert {"records_pgd", "records_PGD-2", "records_pgd-3"} <= set(paths)
    assert all(path.parent == tmp_path for path in paths.values())


def test_unwritable_folder_and_full_disk(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the report .*file"):
        report.write(tmp_path / "file")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*free some space.*records_pgd.csv") as caught:
        report.write(tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC
    assert list((tmp_path / "full").iterdir()) == []


def test_records_are_written_before_anything_can_fail(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("no font")

    monkeypatch.setattr("lit_adv.report.curves_png", broken)
    with pytest.raises(RuntimeError):
        report.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"records_pgd.csv", "records_square-linf.csv", "report.csv", "report.md", "report.json"}


def test_unknown_access_is_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="access must be one of label, probs, logits, gradient, got 'all'"):
        replace(report.outcomes[0], access="all")
