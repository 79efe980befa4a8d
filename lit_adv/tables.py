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
BOX_ONLY = "box only"
_MEASURES = "success, % of attacked"
_SPENT, _SPENT_BY_ALL = "queries of successes", "queries of attacked"
_MOVED, _MOVED_BY_ALL = "mean norm of successes", "mean norm of attacked"


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

    The model is named only where there are several, shares of draws only for random models, queries to the first hit
    only where an attack goes on after it, and the median distance where there is no radius.
    """
    needless: set[tuple[str, str]] = set()
    if len({row.model for row in rows}) < 2:
        needless |= {("", "model")}
    if all(row.draws == 1 for row in rows):
        needless |= {(_MEASURES, "any draw"), (_MEASURES, "mean of draws")}
    if all(row.summary.mean_checks_of_attacked in (0, None) for row in rows):
        needless |= {(_SPENT, "checks"), (_SPENT_BY_ALL, "checks")}
    if all(row.summary.mean_first_hit == row.summary.mean_queries for row in rows):
        needless |= {("queries to first hit", "mean"), ("queries to first hit", "median")}
    if not any(BOX_ONLY in row.threat for row in rows):  # the distance is the result where there is no radius
        needless.add(("distance", "median"))
    elif brief:
        needless |= {(_MEASURES, "first hit"), (_MEASURES, "8-bit")}  # there is room for so many
    if brief:
        needless |= {(column.group, column.head) for column in _COLUMNS if not column.brief}
        if len({row.threat for row in rows}) < 2:
            needless.add(("", "threat"))
    return [column for column in _COLUMNS if (column.group, column.head) not in needless]


def markdown(rows: Sequence[Row], chosen: Sequence[Column] | None = None) -> str:
    """Return a table for a page of Markdown; without columns, the figures that papers give of a black-box attack."""
    chosen = FIGURES if chosen is None else chosen
    lines = [_heads(chosen), ["---:" if column.number else "---" for column in chosen]]
    lines += [[column.cell(row) for column in chosen] for row in rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def table_csv(rows: Sequence[Row], chosen: Sequence[Column] | None = None) -> bytes:
    """Return the same table as CSV, its cells as they are printed."""
    chosen = FIGURES if chosen is None else chosen
    heads = _heads(chosen)
    return csv_bytes([dict(zip(heads, (c.cell(row) for c in chosen), strict=True)) for row in rows], heads)


def _heads(chosen: Sequence[Column]) -> list[str]:
    return [f"{column.group}: {column.head}".removeprefix(": ") for column in chosen]


def threat(norm: str, eps: float) -> str:
    """Print a threat model, as "L∞ 8/255" or "L2 0.5"."""
    name = _NORMS.get(norm, norm)
    if math.isinf(eps):
        return f"{name}, {BOX_ONLY}"
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


def _success(row: Row) -> str:
    return f"{percent(row.summary.success_rate)} {interval(row.summary.success_interval)}".rstrip()


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
    Column(_SPENT, "mean", lambda row: _count(row.summary.mean_queries)),
    Column(_SPENT, "median", lambda row: _count(row.summary.median_queries), brief="median\nqueries"),
    Column(_SPENT, "checks", lambda row: _count(row.summary.mean_checks)),
    Column(_SPENT_BY_ALL, "mean", lambda row: _count(row.summary.mean_queries_of_attacked)),
    Column(_SPENT_BY_ALL, "checks", lambda row: _count(row.summary.mean_checks_of_attacked)),
    Column("queries to first hit", "mean", lambda row: _count(row.summary.mean_first_hit)),
    Column("queries to first hit", "median", lambda row: _count(row.summary.median_first_hit)),
    Column("distance", "median", lambda row: _norm(row.summary.median_distance), brief="median\ndistance"),
    Column(_MOVED, "L2", lambda row: _norm(row.summary.mean_l2)),
    Column(_MOVED, "L\N{INFINITY}", lambda row: _norm(row.summary.mean_linf)),
    Column(_MOVED_BY_ALL, "L2", lambda row: _norm(row.summary.mean_l2_of_attacked)),
    Column(_MOVED_BY_ALL, "L\N{INFINITY}", lambda row: _norm(row.summary.mean_linf_of_attacked)),
)

FIGURES = (
    Column("", "attack", lambda row: row.attack, False),
    Column("", "budget", _budget),
    Column("", "images", lambda row: f"{row.summary.attacked:,}"),
    Column("", "success, % [95 %]", _success),
    Column("successes", "mean L2", lambda row: _norm(row.summary.mean_l2)),
    Column("all attacked", "mean L2", lambda row: _norm(row.summary.mean_l2_of_attacked)),
    Column("successes", "mean queries", lambda row: _count(row.summary.mean_queries)),
    Column("successes", "median queries", lambda row: _count(row.summary.median_queries)),
    Column("all attacked", "mean queries", lambda row: _count(row.summary.mean_queries_of_attacked)),
    Column("all attacked", "of them checks", lambda row: _count(row.summary.mean_checks_of_attacked)),
)
"""What papers say of a black-box attack: success, distortion and queries; see :func:`markdown`."""
