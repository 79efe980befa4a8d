"""One attack tried on one model: images gathered into pools, attacked, verified and written down."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lit_adv.archive import Archive, configuration, fingerprint, learnt, weights_hash
from lit_adv.attack import IterativeAttack, check_images
from lit_adv.chunk import Chunk
from lit_adv.datamodules import Batch
from lit_adv.fast import fast_copy
from lit_adv.look import Restless, first_look, targets
from lit_adv.metrics import Records
from lit_adv.oracle import Access, QueryOracle
from lit_adv.outcome import LOST, RESTLESS, Outcome, notes, stages_of
from lit_adv.pictures import Examples
from lit_adv.protocol import Protocol, identity
from lit_adv.result import AttackResult, added
from lit_adv.verify import correct, verify

_FLUSH_ROWS, _FLUSH_SECONDS = 64, 5.0


@dataclass
class _Pool:
    """Images that wait for their attack, and finished ones that wait to be verified."""

    waiting: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    finished: list[tuple[Tensor, AttackResult]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(images) for images, *_ in self.waiting)


class Trial:
    """A protocol carried out on one model and one data set.

    ``add`` batches, then ``close``; what was written down by an earlier run of the same trial is not done again.

    Args:
        protocol: how the attack is tried.
        model: the deployed model; attacked in eval mode and restored.
        data: name and split of the data set, part of the trial's identity.
        num_classes: classes of the data set, checked against the model's outputs; None: not known.
        dirpath: folder for records and images; None: nothing is written.
        rank: of this process. world: number of processes that share the images.
        total: images that this process will be given, for the progress bar; None: not known.
        progress: whether to show a progress bar. place: its line.
        training: gives training images, not augmented, to an attack that must still learn from some; None: it has to
            have learnt before.
    """

    def __init__(
        self,
        protocol: Protocol,
        model: nn.Module,
        data: str = "",
        num_classes: int | None = None,
        dirpath: Path | None = None,
        rank: int = 0,
        world: int = 1,
        total: int | None = None,
        progress: bool = False,
        place: int = 0,
        training: Callable[[], Batch] | None = None,
    ) -> None:
        self.protocol, self.model, self.rank, self.world = protocol, model, rank, world
        self.num_classes = num_classes
        self.rows: dict[int, dict[str, Any]] = {}
        self.seconds = 0.0
        self.counts: dict[str, tuple[int, int]] = {}
        self._pool, self._seen, self._classes = _Pool(), 0, 0
        self._live: Mapping[str, tuple[int, int]] = {}  # counts of the pool under attack, so far
        self._examples: list[dict[str, Tensor]] = []
        self._prints: dict[int, str] = {}
        self._chunk: Chunk | None = None
        self._fast: nn.Module | None = None
        self._flushed = time.perf_counter()
        self._archive: Archive | None = None
        folder = None if dirpath is None else Path(dirpath) / protocol.name
        if training is not None and protocol.attack.needs_fit:
            seen = training()
            path = None if folder is None else str(folder / "fitted.safetensors")
            protocol.attack.fit(seen.image, seen.label, path)
        if folder is not None:
            known_by = {**configuration(identity(protocol)), "weights": weights_hash(model), "data": data}
            self._archive = Archive(folder, known_by | learnt(protocol.attack), rank)
            self.counts = self._archive.counts().get(rank, {})
        self._known = self._archive.load() if self._archive is not None else {}
        self._judge: nn.Module = model
        if RESTLESS in self._counts():
            self._judge = Restless(model)
        limit = protocol.max_samples
        total = limit if total is None else total if limit is None else min(total, -(-limit // world))
        hide = None if progress else True
        self.bar = tqdm(total=total, desc=protocol.name, unit=" images", position=place, disable=hide)

    def add(self, batch: Batch) -> None:
        """Take images on; they are attacked as soon as a pool of them waits."""
        if not len(batch.image) == len(batch.label) == len(batch.index) or batch.label.dim() != 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in batch)
            raise ValueError(f"a batch must hold images (n, C, H, W), labels (n,) and places (n,), got shapes {shapes}")
        batch = self._within_limit(batch)
        known = self._recall(batch)
        self.bar.update(int(known.sum()))
        fresh = (~known).nonzero().squeeze(1)
        if not len(fresh):
            return
        x, y, index = (part[fresh].clone() for part in (batch.image, batch.label, batch.index))
        if not self._classes:
            self._look_first(x)
        self._look(y)
        right = correct(
            self._judge, x, y, self.protocol.draws, index, self._seed, self._images_at_once, self.protocol.output
        )
        self._write_wrong(y[~right], index[~right])
        target = self._targets(x, y, index)
        chosen = right.nonzero().squeeze(1)
        if len(chosen):
            self._pool.waiting.append((x[chosen], y[chosen], index[chosen], None if target is None else target[chosen]))
        if len(self._pool) >= self.protocol.pool:
            self._attack()

    @property
    def full(self) -> bool:
        """Whether as many images have come as the trial looks at."""
        limit = self.protocol.max_samples
        return limit is not None and self._seen * self.world + self.rank >= limit

    def close(self) -> Records:
        """Attack what still waits; the records of this process's images."""
        if len(self._pool):
            self._attack()
        self.bar.close()
        return Records.from_rows(
            [{k: v for k, v in row.items() if k not in ("trace", "image")} for row in self.rows.values()]
        )

    def outcome(self, records: Records, model: str | None = None) -> Outcome:
        """What goes into the report."""
        threat, counts = self.protocol.attack.threat, self._counts()
        return Outcome(
            name=self.protocol.name,
            records=records,
            norm=threat.norm,
            eps=threat.radius,
            budget=self.protocol.budget,
            draws=self.draws,
            config=configuration(identity(self.protocol)),
            access=self.protocol.granted.name.lower(),
            examples=self.examples(),
            seconds=self.seconds,
            notes=notes(records, self.protocol.budget, self._classes or self.num_classes, counts, self.draws),
            model=model,
            counts=counts,
            stages=stages_of(self.protocol.attack, counts),
            stochastic=self._random,
        )

    @property
    def draws(self) -> int:
        """Fresh decisions by which images are judged."""
        given = self.protocol.draws
        return given if given is not None else (30 if self._random else 1)

    @property
    def _random(self) -> bool:
        return bool(getattr(self._judge, "stochastic", False))

    def examples(self, count: int = 8) -> Examples | None:
        """Clean and returned images of the first successes by place in the data set; failures where there are none."""
        found = {int(image["index"]): image for image in self._examples}
        attacked = [index for index, row in sorted(self.rows.items()) if row["clean_correct"]]
        wanted = [index for index in attacked if self.rows[index]["verified"]] or attacked
        if self._archive is not None:
            found |= self._archive.images(wanted[:count])
        chosen = [index for index in wanted if index in found][:count]
        if not chosen:
            return None
        stacked = {name: torch.stack([found[i][name] for i in chosen]) for name in found[chosen[0]]}
        return Examples(**stacked)

    def _within_limit(self, batch: Batch) -> Batch:
        """The first ``max_samples`` of the data set, whatever the number of processes that share it."""
        place = (self._seen + torch.arange(len(batch.index))) * self.world + self.rank
        self._seen += len(batch.index)
        limit = self.protocol.max_samples
        if limit is None or (len(place) and int(place[-1]) < limit):
            return Batch(*batch)
        kept = (place < limit).to(batch.image.device)
        return Batch(batch.image[kept], batch.label[kept], batch.index[kept])

    def _recall(self, batch: Batch) -> Tensor:
        """Take over the rows of an earlier run that were made from these very images; which those are, (n,) bool."""
        known = torch.zeros_like(batch.index, dtype=torch.bool)
        for place, index in enumerate(batch.index.tolist() if self._archive is not None else []):
            print_ = fingerprint(batch.image[place], int(batch.label[place]))
            self._prints[index] = print_
            row = self._known.get(index)
            if row is not None and row.get("image") == print_:
                self.rows[index] = row
                known[place] = True
        return known

    def _look(self, y: Tensor) -> None:
        """Labels must be classes of the model."""
        if self._classes and len(y) and not 0 <= int(y.min()) <= int(y.max()) < self._classes:
            raise ValueError(
                f"labels must be classes 0 to {self._classes - 1} of the model, got {int(y.min())} to {int(y.max())}: "
                "give class indices, and the data the model was trained on"
            )

    def _look_first(self, x: Tensor) -> None:
        """Learn the number of classes, refuse what is no classifier, and notice what is random without saying so."""
        check_images(x, self.protocol.attack.threat)
        protocol = self.protocol
        sight = first_look(self.model, x[: self._images_at_once], protocol.output, self.num_classes, self._seed)
        self._classes = sight.classes
        if not sight.repeats:
            self._judge_by_many()
            warnings.warn(
                f"{protocol.name}: {type(self.model).__name__} answers the same images differently when asked again: "
                "it draws random numbers, or an answer depends on the batch; if that is a fault (dropout or batch "
                "statistics that stay on), mend it, else make it a lit_adv.defense.Defense with stochastic = True, "
                f"of which attacks know. Images are judged by {self.draws} decisions each",
                stacklevel=4,
            )
        self._fast = self._stand_in()
        attack, budget = self.protocol.attack, self.protocol.budget
        if budget is not None and isinstance(attack, IterativeAttack) and budget < int(attack.least(x.shape[1:])):
            warnings.warn(
                f"{self.protocol.name}: a budget of {budget} is below one step: {attack.least(x.shape[1:])} queries",
                stacklevel=4,
            )

    def _targets(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor | None:
        rule, classes = self.protocol.target, self._classes
        if rule == "none":
            return None
        if not classes or (rule == "least_likely" and self.protocol.output == "labels"):
            raise ValueError(f"target {rule!r} needs a model that tells scores or, but for least_likely, num_classes")
        return targets(rule, self.model, x, y, index, classes, self._seed, self._images_at_once)

    def _stand_in(self) -> nn.Module | None:
        """What answers the search in the model's place, where that is asked for and of use."""
        protocol = self.protocol
        if not protocol.hastened:
            return None
        access, name = protocol.attack.access, type(protocol.attack).__name__
        if access in (Access.GRADIENT, Access.LABEL):
            # a search along the boundary keeps to the stand-in's, where the model itself seldom agrees
            reason = "needs gradients" if access == Access.GRADIENT else "walks along the boundary by labels"
            warnings.warn(
                f"{protocol.name}: precision, channels_last and compile are for attacks that read scores; {name} "
                f"{reason}, so the model is asked as it is",
                stacklevel=5,
            )
            return None
        return fast_copy(self.model, protocol.precision, protocol.channels_last, protocol.compile)

    def _judge_by_many(self) -> None:
        """Judge images by fresh decisions, as those of a model that says that it is random."""
        self._judge = Restless(self.model)
        self._count({RESTLESS: (1, 1)})

    def _count(self, counts: Mapping[str, tuple[int, int]]) -> None:
        self.counts = added([self.counts, counts])
        if self._archive is not None and counts:
            self._archive.keep(self.counts)

    def _counts(self) -> dict[str, tuple[int, int]]:
        """Of all processes that write to one folder, and of the runs before this one."""
        parts = {**(self._archive.counts() if self._archive is not None else {}), self.rank: self.counts}
        return added(parts.values())

    def _attack(self) -> None:
        begun = time.perf_counter()
        columns = list(zip(*self._pool.waiting, strict=True))
        x, y, index = (torch.cat(column) for column in columns[:3])
        target = None if columns[3][0] is None else torch.cat(columns[3])
        self._pool.waiting.clear()
        protocol = self.protocol
        oracle = QueryOracle(
            self.model, len(x), protocol.granted, protocol.budget, self._chunk or protocol.chunk, protocol.surrogate,
            protocol.answers, protocol.confirm, self._fast,
            protocol.output, index=index, seed=self._seed, known_right=True,
        )  # fmt: skip
        self._chunk = oracle.chunk_tuner
        pool = (x, y, index, target)
        result = protocol.attack(
            oracle, x, y, target, index, finished=lambda rows, ended: self._finish(pool, rows, ended)
        )
        self._flush(pool)
        self._live = {}
        self._count(result.counts)
        if result.nonfinite:
            self._count({LOST: (result.nonfinite, int(result.queries.sum()))})
        self.seconds += time.perf_counter() - begun

    def _finish(self, pool: tuple[Tensor, Tensor, Tensor, Tensor | None], rows: Tensor, result: AttackResult) -> None:
        self._pool.finished.append((rows, result))
        self._live = result.counts
        waiting = sum(len(ended) for ended, _ in self._pool.finished)
        if waiting >= _FLUSH_ROWS or time.perf_counter() - self._flushed > _FLUSH_SECONDS:
            self._flush(pool)

    def _flush(self, pool: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        """Verify finished images and write them down."""
        finished, self._pool.finished = self._pool.finished, []
        self._flushed = time.perf_counter()
        if not finished:
            return
        rows = torch.cat([ended for ended, _ in finished])
        x_adv = torch.cat([result.x_adv for _, result in finished])
        x0, y, index = (part[rows] for part in pool[:3])
        target = None if pool[3] is None else pool[3][rows]
        seen = verify(
            self._judge, self.protocol.attack.threat, x_adv, x0, y, target,
            self.protocol.draws, index, self._seed, self._images_at_once, self.protocol.output,
        )  # fmt: skip
        delta = (x_adv.double() - x0.double()).flatten(1)
        columns: dict[str, Tensor] = {
            "index": index, "label": y, "target": torch.full_like(y, -1) if target is None else target,
            "clean_correct": torch.ones_like(seen.any), "verified": seen.verified, "verified_any": seen.any,
            "verified_mean": seen.mean, "rounded": seen.rounded,
            "l2": delta.norm(dim=1), "linf": delta.abs().amax(1),
        }  # fmt: skip
        for name in ("distance", "queries", "checks", "first_hit", "iterations"):
            columns[name] = torch.cat([getattr(result, name) for _, result in finished])
        columns["claimed"] = torch.cat([result.success for _, result in finished])
        columns["verified"] &= columns["claimed"]  # what the attacker could not know within its budget is no success
        columns["rounded"] &= columns["claimed"]
        traces = [_trace(result, row) for _, result in finished for row in range(len(result))]
        images = {"index": index, "label": y, "predicted": seen.label, "x0": x0, "x_adv": x_adv}
        self._write([{**row, "trace": trace} for row, trace in zip(_rows(columns), traces, strict=True)], images)
        if self._archive is not None and self._live:  # a run broken off now goes on from here
            self._archive.keep(added([self.counts, self._live]))

    def _write_wrong(self, y: Tensor, index: Tensor) -> None:
        """Images wrong at first: never attacked, broken at distance 0 with no query."""
        zero = torch.zeros_like(y)
        no, nothing = zero.bool(), zero.double()
        columns = {
            "index": index, "label": y, "target": zero - 1, "clean_correct": no, "claimed": no, "verified": no,
            "verified_any": no, "verified_mean": nothing, "rounded": no, "distance": nothing, "l2": nothing,
            "linf": nothing, "queries": zero, "checks": zero, "first_hit": zero - 1, "iterations": zero,
        }  # fmt: skip
        self._write([{**row, "trace": []} for row in _rows(columns)], {})

    def _write(self, rows: list[dict[str, Any]], images: dict[str, Tensor]) -> None:
        if not rows:
            return
        if self._archive is not None:
            rows = [{**row, "image": self._prints[row["index"]]} for row in rows]
            self._archive.append(rows, images)
        if images and len(self._examples) < 64:
            self._examples += [{name: value[i].cpu() for name, value in images.items()} for i in range(len(rows))][:64]
        self.rows |= {int(row["index"]): row for row in rows}
        self.bar.update(len(rows))
        attacked = [row for row in self.rows.values() if row["clean_correct"]]
        broken, queries = sum(row["verified"] for row in attacked), sum(row["queries"] for row in attacked)
        self.bar.set_postfix_str(f"success {broken / max(1, len(attacked)):.1%}, {queries:,} queries", refresh=False)

    @property
    def _seed(self) -> int:
        return self.protocol.attack.seed

    @property
    def _images_at_once(self) -> int:
        return self._chunk.size if self._chunk is not None else (self.protocol.chunk or 256)


def _rows(columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    lists = {name: [_plain(v) for v in value.cpu().tolist()] for name, value in columns.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _plain(value: float) -> float | None:
    return None if value == float("inf") else value


def _trace(result: AttackResult, row: int) -> list[list[float]]:
    return [entry[1:] for entry in result.trace[result.trace[:, 0] == row].tolist()]
