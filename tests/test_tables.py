"""How figures are printed."""

from __future__ import annotations

import math

import pytest

from lit_adv.metrics import Interval, Records, summarize
from lit_adv.tables import Row, columns, csv_bytes, interval, p_value, percent, threat


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


def test_every_cell_of_an_empty_row_prints() -> None:
    row = Row("net", "pgd", "L2 0.5", "gradient", 1000, summarize(Records.empty()), draws=30)
    cells = [column.cell(row) for column in columns([row])]
    assert all(cells)
    assert "None" not in " ".join(cells)


def test_csv() -> None:
    rows = [{"a": True, "b": None, "c": 'x, "y"'}, {"a": False, "b": 0.1, "c": ""}]
    assert csv_bytes(rows, ["a", "b", "c"]) == b'a,b,c\n1,,"x, ""y"""\n0,0.1,\n'
