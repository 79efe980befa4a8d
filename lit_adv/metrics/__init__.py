"""Measures of attacks: one record per image, and plain functions of records."""

from lit_adv.metrics.detection import Estimate, auc, auc_interval, share_above, threshold_at
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
    "Estimate",
    "Interval",
    "McNemar",
    "Records",
    "Summary",
    "auc",
    "auc_interval",
    "iterations_curve",
    "mcnemar",
    "queries_curve",
    "share_above",
    "summarize",
    "threshold_at",
    "wilson",
    "worst_case",
]
