"""How two ways of doing the same work are timed against each other on a machine that does other things too."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Comparison:
    """Seconds of a baseline and of our way, taken in turn.

    Attributes:
        name: what was done.
        goal: largest ratio we want to see.
        work: how much of it each repetition does, in words.
        baseline: seconds of each repetition. ours: the same.
    """

    name: str
    goal: float
    work: str
    baseline: list[float]
    ours: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours over the baseline that ran just before it."""
        return [ours / baseline for baseline, ours in zip(self.baseline, self.ours, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the pairwise ratios."""
        return statistics.median(self.ratios)


def clock_for(device: torch.device, threads: int) -> Clock:
    """Seconds that count: of the processor on one thread, so that what else runs is left out; else of the wall."""
    if device.type == "cpu":
        return time.process_time if threads == 1 else time.perf_counter

    def after_the_device() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return after_the_device


def seconds(work: Callable[[], object], clock: Clock) -> float:
    """What one go takes."""
    begun = clock()
    work()
    return clock() - begun


def in_turn(
    baseline: Callable[[], object], ours: Callable[[], object], repetitions: int, clock: Clock
) -> tuple[list[float], list[float]]:
    """Seconds of both, one after the other, so that a slow spell of the machine hits the two alike."""
    pairs = [(seconds(baseline, clock), seconds(ours, clock)) for _ in range(repetitions)]
    return [first for first, _ in pairs], [second for _, second in pairs]
