"""One attack on one network: what it found, what it asked, how long it took."""

import ctypes
import gc
import math
import random
import re
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from measure import in_turn
from peers_adapters import Peer, Run, Task
from peers_ours import Ours
from torch import Tensor, nn


@dataclass(frozen=True)
class Victim:
    """A network, images that it classifies rightly, the classes it finds next likely, and its best batch size."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    runner_up: Tensor
    size: int


@dataclass(frozen=True)
class Figures:
    """One row of the table.

    Attributes:
        images: attacked. broken: of them, checked here. seen: images of which some query was a valid hit.
        queries: mean over all. to_hit: mean up to the first valid hit, over images of which one was seen.
        seconds: of the processor. limit: over bare forwards of all queries. useful: over those up to first hits.
        after: share of the queries that came after the first valid hit. peak: MB that the process grew by.
        altered: the library was changed for this. note: what to know besides.
        limit_goal, factor, factor_goal: of ours; the factor is over the best library, per broken image.
    """

    attack: str
    model: str
    library: str
    words: str
    images: int = 0
    broken: int = 0
    seen: int = 0
    queries: float = math.nan
    to_hit: float = math.nan
    seconds: float = math.nan
    limit: float = math.nan
    useful: float = math.nan
    after: float = math.nan
    peak: float = math.nan
    altered: bool = False
    note: str = ""
    limit_goal: float | None = None
    factor: float | None = None
    factor_goal: float | None = None

    def short(self) -> str:
        """A line for the impatient."""
        return f"{self.broken}/{self.images} broken, x limit {self.limit:.2f}, {self.seconds:.2f} s {self.note}"

    def cells(self) -> tuple[str, ...]:
        """The table's cells, from the number of images on."""
        each = 1000 * self.seconds / self.broken if self.broken else math.nan
        share = self.broken / self.images if self.images else math.nan
        limit, factor = f"{self.limit:.2f}", "" if self.factor is None else f"{self.factor:.1f}"
        if self.limit_goal is not None:
            limit = _judged(limit, self.limit <= self.limit_goal, f"{self.limit_goal:.2f}")
        if self.factor is not None and self.factor_goal is not None:
            factor = _judged(factor, self.factor >= self.factor_goal, f"{self.factor_goal:g}")
        numbers = (f"{self.queries:,.0f}", f"{self.to_hit:,.0f}", f"{each:.2f}", limit, f"{self.useful:.2f}")
        cells = (f"{self.images}", f"{share:.0%}", *numbers, f"{self.after:.0%}", f"{self.peak:.0f}", factor)
        return tuple("-" if "nan" in cell else cell for cell in cells)


def _judged(value: str, met: bool, goal: str) -> str:
    return f"[{'green' if met else 'red'}]{value}[/] ({goal})"


class Cut(BaseException):
    """The attack took longer than anyone wants to wait; no library catches this."""


class Watch:
    """Counts what reaches the model, image by image, and notes the first valid hit of each."""

    def __init__(self, x: Tensor, y: Tensor, target: Tensor | None, task: Task, form: str) -> None:
        self.x, self.y, self.target, self.task, self.form = x, y, target, task, form
        self.seen = torch.zeros(len(x), dtype=torch.int64)
        self.first = torch.full((len(x),), -1)
        self.total, self.single = 0, 0

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, logits = inputs[0].detach(), output.detach()
        self.total += len(x)
        if self.form == "own":
            return
        owner = self._owner(x)
        target = None if self.target is None else self.target[owner]
        hit = valid(x, logits, self.x[owner], self.y[owner], target, self.task)
        if (hit & (self.first[owner] < 0)).any():
            number = self.seen[owner] + 1 + _occurrence(owner)
            for place in hit.nonzero().squeeze(1).tolist():
                row = int(owner[place])
                self.first[row] = number[place] if self.first[row] < 0 else self.first[row]
        self.seen += owner.bincount(minlength=len(self.x))

    def _owner(self, x: Tensor) -> Tensor:
        if self.form == "single":
            return torch.full((len(x),), self.single)
        if self.form == "batch":
            if len(x) % len(self.x):
                raise RuntimeError(f"a forward of {len(x)} images does not hold all {len(self.x)} images")
            return torch.arange(len(x)) % len(self.x)
        return torch.cdist(x.flatten(1), self.x.flatten(1), p=torch.inf).argmin(1)


def valid(x: Tensor, logits: Tensor, x0: Tensor, y: Tensor, target: Tensor | None, task: Task) -> Tensor:
    """Which images are adversarial within the task: finite, in box and ball, and classified as the attacker wants."""
    label = logits.argmax(1)
    won = label != y if target is None else label == target
    if not won.any():  # most forwards, and for many libraries a forward is one image
        return won
    flat = x.double().flatten(1)
    difference = flat - x0.double().flatten(1)
    distance = difference.abs().amax(1) if task.norm == "linf" else difference.norm(dim=1)
    inside = (distance <= task.eps * (1 + 1e-6)) & (flat.amin(1) >= 0) & (flat.amax(1) <= 1)
    return won & inside & flat.isfinite().all(1) & logits.isfinite().all(1)


def _occurrence(owner: Tensor) -> Tensor:
    """How often each entry has stood before in ``owner``."""
    same = owner[:, None] == owner
    return same.tril(-1).sum(1)


def measure(attack: str, victim: Victim, peer: Peer, task: Task, targeted: bool, patience: float) -> Figures:
    """A run that is watched, then runs that are timed in turn with bare forwards over as many images."""
    target = victim.runner_up if targeted else None
    run = peer.prepare(victim.net, task)
    watch, found, images, peak = _watched(victim, peer, run, task, target, patience)
    x, y = victim.x[:images], victim.y[:images]
    aim = None if target is None else target[:images]
    with torch.no_grad():
        logits = torch.cat([victim.net(part) for part in torch.split(found, 64)])
    broken = int(valid(found, logits, x, y, aim, task).sum())
    first, seen = watch.first[:images], watch.seen[:images]
    if isinstance(run, Ours):
        first, seen = run.result.first_hit, run.result.queries
        if int(seen.sum()) != watch.total:
            raise RuntimeError(f"{attack}: the ledger says {int(seen.sum())} queries, the model saw {watch.total}")
    hits = first >= 0
    useful = int(torch.where(hits, first, seen).sum())
    seconds, limit = _timed(victim, peer, run, x, y, aim, watch.total)
    note = "" if images == len(victim.x) else f"{images} images only: slow"
    return Figures(
        attack=attack,
        model=victim.name,
        library=peer.library,
        words=f"{peer.words}{'; ' if note else ''}{note}",
        images=images,
        broken=broken,
        seen=int(hits.sum()),
        queries=float(seen.double().mean()),
        to_hit=float(first[hits].double().mean()),
        seconds=seconds,
        limit=limit,
        useful=limit * watch.total / useful,
        after=1 - useful / watch.total,
        peak=peak,
        altered=peer.altered,
        note=note,
    )


def _watched(
    victim: Victim, peer: Peer, run: Run, task: Task, target: Tensor | None, patience: float
) -> tuple[Watch, Tensor, int, float]:
    """A run under watch, on fewer images where it would take longer than one cares to wait."""
    images = len(victim.x)
    while True:
        x, y = victim.x[:images], victim.y[:images]
        watch = Watch(x, y, None if target is None else target[:images], task, peer.form)
        handle = victim.net.register_forward_hook(watch)
        try:
            with growth() as memory, time_limit(4 * patience if images > 1 else 1e6):
                found = _run(peer, run, x, y, watch.target, watch, patience)
            return watch, found, len(found), memory[0]
        except Cut:
            images = max(1, images // 4)
        finally:
            handle.remove()


def _run(
    peer: Peer, run: Run, x: Tensor, y: Tensor, target: Tensor | None, watch: Watch | None = None, patience: float = 1e9
) -> Tensor:
    """Adversarial images of all, or of those that patience sufficed for."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what the libraries draw from
    random.seed(0)
    if peer.form != "single":
        return run(x, y, target)
    begun, found = time.process_time(), []
    for number in range(len(x)):
        if watch is not None:
            watch.single = number
        if number and time.process_time() - begun > patience:
            break
        chosen = slice(number, number + 1)
        found.append(run(x[chosen], y[chosen], None if target is None else target[chosen]))
    return torch.cat(found)


def _timed(
    victim: Victim, peer: Peer, run: Run, x: Tensor, y: Tensor, target: Tensor | None, queries: int
) -> tuple[float, float]:
    """Least seconds of the attack, and the median of its ratios to bare forwards over as many images."""
    batch = torch.rand(victim.size, *victim.x.shape[1:])
    begun = time.process_time()
    with torch.no_grad():
        victim.net(batch)
    rate = (time.process_time() - begun) / victim.size
    forwards = max(1, min(queries, int(1 / rate)) // victim.size)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(forwards):
                victim.net(batch)

    def attacked() -> None:
        _run(peer, run, x, y, target)

    gc.collect()
    base, took = in_turn(bare, attacked, 1, time.process_time)
    more = 4 if took[0] < 2 else 1 if took[0] < 10 else 0
    again = in_turn(bare, attacked, more, time.process_time)
    share = queries / (forwards * victim.size)
    ratios = [one / (other * share) for one, other in zip(took + again[1], base + again[0], strict=True)]
    return min(took + again[1]), statistics.median(ratios)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`Cut` after so many seconds of the processor."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Cut

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def growth() -> Iterator[list[float]]:
    """MB that the process grows by at most; NaN elsewhere than on Linux."""
    found, status = [math.nan], Path("/proc/self/status")
    if not status.exists():
        yield found
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status(status, "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    yield found
    found[0] = (_status(status, "VmHWM") - before) / 1024


def _status(status: Path, name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    return int(match[1]) if match else 0
