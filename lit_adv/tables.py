"""Columns of a report's table, and how figures are printed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lit_adv.metrics.summary import Interval, Summary

NONE = "\N{EN DASH}"
_NORMS = {"linf": "L\N{INFINITY}", "l2": "L2", "l1": "L1", "l0": "L0"}
_MEASURES = "success, % of attacked"


class Row(NamedTuple):
    """One line of the table: an attack, or the worst case over several."""

    model: str
    attack: str
    threat: str
    access: str
    budget: int | None
    summary: Summary
    draws: int = 1
    worst: bool = False


class Column(NamedTuple):
    """One column: the head of its group, its own head, what stands in it, whether that is a number.

    ``brief`` is its head in a narrow table, empty where it has no place there.
    """

    group: str
    head: str
    cell: Callable[[Row], str]
    number: bool = True
    brief: str = ""


def columns(rows: Sequence[Row], brief: bool = False) -> list[Column]:
    """Return the columns that these rows need, of them the most important ones if ``brief``.

    The model is named only where there are several, shares of draws only for random models, and queries to
    the first hit only where an attack goes on after it.
    """
    needless: set[tuple[str, str]] = set()
    if len({row.model for row in rows}) < 2:
        needless |= {("", "model")}
    if all(row.draws == 1 for row in rows):
        needless |= {(_MEASURES, "any draw"), (_MEASURES, "mean of draws")}
    if all(row.summary.mean_first_hit == row.summary.mean_queries for row in rows):
        needless |= {("queries to first hit", "mean"), ("queries to first hit", "median")}
    if brief:
        needless |= {(column.group, column.head) for column in _COLUMNS if not column.brief}
        if len({row.threat for row in rows}) < 2:
            needless.add(("", "threat"))
    return [column for column in _COLUMNS if (column.group, column.head) not in needless]


def threat(norm: str, eps: float) -> str:
    """Print a threat model, as "L∞ 8/255" or "L2 0.5"."""
    name = _NORMS.get(norm, norm)
    if math.isinf(eps):
        return f"{name}, box only"
    levels = eps * 255
    exact = norm == "linf" and levels > 0.5 and abs(levels - round(levels)) < 1e-3
    return f"{name} {round(levels)}/255" if exact else f"{name} {eps:.4g}"


def percent(share: float | None) -> str:
    """Print a share in per cent."""
    return NONE if share is None else f"{100 * share:.1f}"


def interval(ends: Interval | None) -> str:
    """Print an interval in per cent."""
    return "" if ends is None else f"[{percent(ends.low)}, {percent(ends.high)}]"


def p_value(p: float | None) -> str:
    """Print a p value."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def csv_bytes(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """Encode a table; booleans become 0 and 1, None an empty field."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([int(row[name]) if isinstance(row[name], bool) else row[name] for name in names])
    return stream.getvalue().encode()


def _robust(row: Row) -> str:
    return f"{percent(row.summary.robust_accuracy)} {interval(row.summary.robust_interval)}".rstrip()


def _budget(row: Row) -> str:
    return "" if row.worst else NONE if row.budget is None else f"{row.budget:,}"


def _count(number: float | None) -> str:
    if number is None:
        return NONE
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}".removesuffix(".0")


def _norm(number: float | None) -> str:
    return NONE if number is None else f"{number:.3f}"


_COLUMNS = (
    Column("", "model", lambda row: row.model, False, "model"),
    Column("", "attack", lambda row: row.attack, False, "attack"),
    Column("", "threat", lambda row: row.threat, False, "threat"),
    Column("", "access", lambda row: row.access, False),
    Column("", "budget", _budget),
    Column("images", "all", lambda row: f"{row.summary.images:,}"),
    Column("images", "wrong at first", lambda row: f"{row.summary.wrong_at_first:,}"),
    Column("accuracy, %", "clean", lambda row: percent(row.summary.clean_accuracy), brief="clean\n%"),
    Column("accuracy, %", "robust [95 %]", _robust, brief="robust %\n[95 %]"),
    Column(_MEASURES, "first hit", lambda row: percent(row.summary.claimed_success_rate), brief="first\nhit %"),
    Column(_MEASURES, "verified", lambda row: percent(row.summary.success_rate), brief="verified\n%"),
    Column(_MEASURES, "any draw", lambda row: percent(row.summary.any_success_rate)),
    Column(_MEASURES, "mean of draws", lambda row: percent(row.summary.mean_success_rate)),
    Column(_MEASURES, "8-bit", lambda row: percent(row.summary.rounded_success_rate), brief="8-bit\n%"),
    Column("success, %", "of all", lambda row: percent(row.summary.success_over_all)),
    Column("queries of successes", "mean", lambda row: _count(row.summary.mean_queries)),
    Column("queries of successes", "median", lambda row: _count(row.summary.median_queries), brief="median\nqueries"),
    Column("queries to first hit", "mean", lambda row: _count(row.summary.mean_first_hit)),
    Column("queries to first hit", "median", lambda row: _count(row.summary.median_first_hit)),
    Column("mean norm", "L2", lambda row: _norm(row.summary.mean_l2)),
    Column("mean norm", "L\N{INFINITY}", lambda row: _norm(row.summary.mean_linf)),
)
