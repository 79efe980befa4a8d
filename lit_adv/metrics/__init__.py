"""Measures of attacks: one record per image, and plain functions of records."""

from lit_adv.metrics.records import AttackRecords, Records
from lit_adv.metrics.summary import (
    Interval,
    McNemar,
    Summary,
    iterations_curve,
    mcnemar,
    queries_curve,
    summarize,
    wilson,
    worst_case,
)

__all__ = [
    "AttackRecords",
    "Interval",
    "McNemar",
    "Records",
    "Summary",
    "iterations_curve",
    "mcnemar",
    "queries_curve",
    "summarize",
    "wilson",
    "worst_case",
]
