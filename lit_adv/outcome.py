"""What an attack achieved on a model, and what follows from several of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lit_adv.attack import Attack
from lit_adv.metrics.records import Records
from lit_adv.metrics.summary import McNemar, Summary, wilson
from lit_adv.pictures import Examples
from lit_adv.result import BAD_GRADIENT, ZERO_GRADIENT, broken_by
from lit_adv.tables import interval, percent, threat

LOST, RESTLESS = "answers that held NaN and counted as no success", "the model did not repeat its answers"
_ACCESS = ("label", "probs", "logits", "gradient")


class Stage(NamedTuple):
    """What one attack of a cascade found among the images that those before it left.

    Attributes:
        name: of the attack.
        access: what it reads: "label", "probs", "logits" or "gradient".
        seen: images it was tried on.
        broken: of them.
    """

    name: str
    access: str
    seen: int
    broken: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one attack achieved on one model.

    Args:
        name: The attack's name in tables and file names.
        records: One row per image of the evaluated set.
        norm: The threat model's norm.
        eps: Its radius; inf: bound by the box only.
        budget: Most queries an image may cost, None if unlimited.
        draws: Fresh answers that decided whether a success counts; 1 for a deterministic model.
        config: The attack's class path and arguments, ready for JSON.
        access: What the attacker saw: "label", "probs", "logits" or "gradient" (white box).
        examples: Images to show.
        seconds: Wall-clock time of the attack.
        notes: Remarks to print.
        counts: How often something worth knowing happened, and of how many times, by what it was.
        model: The model's name where one report holds several; None: the report's own.
        stages: What each part found, in order, where the attack is a cascade.
        stochastic: Whether the model draws random numbers, said or noticed.

    Raises:
        ValueError: If the access is unknown.
    """

    name: str
    records: Records
    norm: str
    eps: float
    budget: int | None
    draws: int
    config: Mapping[str, Any]
    access: str
    examples: Examples | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    model: str | None = None
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.access not in _ACCESS:
            raise ValueError(f"access must be one of {', '.join(_ACCESS)}, got {self.access!r}")
        object.__setattr__(self, "records", self.records.unique())


def stages_of(attack: Attack, counts: Mapping[str, tuple[int, int]]) -> tuple[Stage, ...]:
    """What each part of a cascade found; () for any other attack."""
    parts = getattr(attack, "attacks", None)
    if not isinstance(parts, Mapping):
        return ()
    found = {name: counts.get(broken_by(name), (0, 0)) for name in parts}
    return tuple(Stage(name, parts[name].access.name.lower(), seen, broken) for name, (broken, seen) in found.items())


def notes(
    records: Records, budget: int | None, classes: int | None, counts: Mapping[str, tuple[int, int]], draws: int
) -> tuple[str, ...]:
    """Say what a reader of the figures must know.

    Args:
        records: One row per image.
        budget: Queries per image, None if unlimited.
        classes: Number of classes; None or 0: as many as the labels need.
        counts: How often what happened, of how many times.
        draws: Decisions by which an image was judged.
    """
    found = []
    if budget is not None and not int(records.queries.sum()) and bool(records.clean_correct.any()):
        found.append(f"the budget of {budget} queries covers no step: nothing was tried")
    rate = wilson(int(records.clean_correct.sum()), len(records))
    classes = classes or (int(records.label.max()) + 1 if len(records) else 0)
    if rate is not None and classes and rate.high < 1.5 / classes:
        found.append(
            "the clean accuracy is that of guessing: does the model expect another range of pixels, normalise "
            "twice, or hold untrained weights?"
        )
    lost = int((records.claimed & ~records.verified).sum())
    if lost:
        found.append(f"{lost} claimed successes did not survive verification and do not count")
    if RESTLESS in counts:
        found.append(
            f"{RESTLESS}, though it does not say that it is random: images were judged by {draws} decisions each"
        )
    for name, (happened, times) in counts.items():
        if name != RESTLESS and times and (happened or name not in (ZERO_GRADIENT, BAD_GRADIENT)):
            found.append(f"{name}: {happened:,} of {times:,} ({percent(happened / times)} %)")
    return tuple(found)


@dataclass(frozen=True)
class Verdict:
    """The worst case per image over all attacks on one model under one threat model."""

    model: str
    norm: str
    eps: float
    attacks: tuple[str, ...]
    summary: Summary

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        attacks = self.attacks[0] if len(self.attacks) == 1 else f"the worst of {len(self.attacks)} attacks"
        if self.summary.robust_accuracy is None:
            return f"robust accuracy is undefined against {attacks}: there is no image that all of them saw"
        share = f"{percent(self.summary.robust_accuracy)} % {interval(self.summary.robust_interval)}"
        return f"robust accuracy {share} against {attacks}"

    @property
    def setting(self) -> str:
        """Model, threat model and number of images."""
        return f"{self.model}, {threat(self.norm, self.eps)}, {self.summary.images:,} images"


@dataclass(frozen=True)
class Comparison:
    """Two attacks on one model, or one attack on two models, on the images both saw."""

    first: str
    second: str
    test: McNemar
