"""How figures are printed."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest

from lit_adv.metrics import Interval, Records, summarize
from lit_adv.tables import Row, columns, csv_bytes, interval, markdown, p_value, percent, table_csv, threat


@pytest.mark.parametrize(
    ("norm", "eps", "text"),
    [
        ("linf", 8 / 255, "L∞ 8/255"),
        ("linf", 0.031, "L∞ 0.031"),
        ("linf", 0.3, "L∞ 0.3"),
        ("linf", 0.0, "L∞ 0"),
        ("l2", 8 / 255, "L2 0.03137"),
        ("l2", 0.5, "L2 0.5"),
        ("linf", math.inf, "L∞, box only"),
    ],
)
def test_threat(norm: str, eps: float, text: str) -> None:
    assert threat(norm, eps) == text


def test_figures() -> None:
    assert [percent(share) for share in (None, 0.0, 0.7125, 1.0)] == ["\N{EN DASH}", "0.0", "71.2", "100.0"]
    assert [interval(ends) for ends in (None, Interval(0.671, 0.75))] == ["", "[67.1, 75.0]"]
    assert [p_value(p) for p in (None, 0.0004, 0.049, 1.0)] == ["\N{EN DASH}", "< 0.001", "0.049", "1.000"]


def test_columns_appear_when_needed() -> None:
    row = Row("net", "pgd", "L2 0.5", "gradient", None, summarize(Records.empty()))
    plain = {(column.group, column.head) for column in columns([row])}
    assert not plain & {("", "model"), ("success, % of attacked", "any draw"), ("queries to first hit", "mean")}
    random = {(column.group, column.head) for column in columns([row, row._replace(model="other", draws=30)])}
    assert random - plain == {
        ("", "model"),
        ("success, % of attacked", "any draw"),
        ("success, % of attacked", "mean of draws"),
    }
    unlimited = {(column.group, column.head) for column in columns([row, row._replace(threat="L2, box only")])}
    assert unlimited - plain == {("distance", "median")}


def test_every_cell_of_an_empty_row_prints() -> None:
    row = Row("net", "pgd", "L2 0.5", "gradient", 1000, summarize(Records.empty()), draws=30)
    cells = [column.cell(row) for column in columns([row])]
    assert all(cells)
    assert "None" not in " ".join(cells)


ROW = {
    "index": 0, "label": 1, "target": -1, "clean_correct": True, "claimed": False, "verified": False,
    "verified_any": False, "verified_mean": 0.0, "rounded": False, "distance": math.inf, "l2": 0.5, "linf": 0.1,
    "queries": 1001, "checks": 1, "first_hit": -1, "iterations": 10,
}  # fmt: skip
HIT = {"claimed": True, "verified": True, "l2": 1.0, "queries": 11, "checks": 2, "first_hit": 11}


def table() -> list[Row]:
    """Four images, one of them wrong at first, one broken after 11 queries; and nothing at all."""
    records = Records.from_rows([ROW, ROW | {"index": 1}, ROW | HIT | {"index": 2}, ROW | {"clean_correct": False}])
    return [
        Row("net", "a|b", "L2 0.5", "probs", 20000, summarize(records)),
        Row("net", "none", "L2 0.5", "probs", None, summarize(Records.empty())),
    ]


def test_figures_of_a_paper_as_markdown_and_csv() -> None:
    head, rule, first, second = markdown(table()).splitlines()
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", first)[1:-1]]
    assert cells == ["a\\|b", "20,000", "3", "33.3 [6.1, 79.2]", "1.000", "0.667", "11", "11", "671", "1.3"]
    assert head.split(" | ")[3:6] == ["success, % [95 %]", "successes: mean L2", "all attacked: mean L2"]
    assert set(rule) == set("|- :")
    assert second.count("\N{EN DASH}") == 8
    read = list(csv.reader(io.StringIO(table_csv(table()).decode())))
    assert read[0] == [cell.strip() for cell in head.split("|")[1:-1]]
    assert read[1] == ["a|b", *cells[1:]]
    chosen = [column for column in columns(table()) if column.head in ("attack", "checks")]
    assert markdown(table(), chosen).splitlines()[2] == "| a\\|b | 2 | 1.3 |"


def test_csv() -> None:
    rows = [{"a": True, "b": None, "c": 'x, "y"'}, {"a": False, "b": 0.1, "c": ""}]
    assert csv_bytes(rows, ["a", "b", "c"]) == b'a,b,c\n1,,"x, ""y"""\n0,0.1,\n'
