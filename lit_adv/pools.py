"""Work in pools: what is finished stands whole in a file of its own, beside a note of what all was made with."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

_SHARDS = "pool.*.safetensors"

Columns = TypeVar("Columns", bound=tuple[Tensor, ...])


@dataclass(frozen=True)
class Pools:
    """A folder of pools of one making, each a safetensors file that is there as a whole or not at all.

    Images are worked on in pools of a fixed size, so a run that was broken off, and any number of processes, make the
    same files.

    Args:
        folder: where they lie. name: of the note's file.
        what: what they hold, and maker: the command that makes them, for messages.
        columns: names of the tensors with one entry a finding; "index", the image's place, is among them.
        each: names of those with one entry an image tried; "tried", the image's place, is among them.
        checked: the note with the entries that readers need brought to their types; raises where it cannot.
    """

    folder: Path
    name: str
    what: str
    maker: str
    columns: frozenset[str]
    each: frozenset[str]
    checked: Callable[[dict[str, Any]], dict[str, Any]]

    def note(self) -> dict[str, Any] | None:
        """What the pools were made with; None where there is nothing.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / self.name
        if not path.is_file():
            return None
        try:
            return self.checked(json.loads(path.read_text()))
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path} is damaged ({error}): choose another folder, or remove this one") from None

    def existing_note(self) -> dict[str, Any]:
        """What the pools were made with.

        Raises:
            FileNotFoundError: there is no note. ValueError: it is damaged.
        """
        note = self.note()
        if note is None:
            raise FileNotFoundError(
                f"{self.folder} holds no {self.what} (no file {self.name}): make them by {self.maker}, or correct the "
                "path"
            )
        return note

    def begin(self, note: dict[str, Any], rank: int) -> None:
        """Write down what the pools are made with, or refuse a folder made with something else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = self.note()
        if there is None:
            part = self.folder / f".{self.name}.rank{rank}"
            part.write_text(json.dumps(note, indent=1))
            os.replace(part, self.folder / self.name)
            return
        wanted = json.loads(json.dumps(note))
        differing = [name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)]
        if differing:
            raise ValueError(
                f"the {self.what} in {self.folder} were made with another {', '.join(sorted(differing))} (see "
                f"{self.name} there): choose another folder"
            )

    def fill(
        self,
        places: Tensor,
        pool: int,
        make: Callable[[list[int]], dict[str, Tensor]],
        rank: int,
        world: int,
        progress: bool = False,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make this process's share of the pools that are not there yet.

        Args:
            places: of the images to try, in order. pool: images in one file.
            make: from places to the pool's tensors.
            rank: of this process, of ``world`` that share the work.
            progress: show a progress bar.
            enough: asked before each pool; True ends the work.
        """
        pools = list(enumerate(torch.split(places, pool)))
        sizes = {number: len(part) for number, part in pools}
        # one that was the last may hold fewer images than it should by now
        done = {number for number, shard in self.shards() if len(shard["tried"]) >= sizes.get(number, 0)}
        own = [(number, part) for number, part in pools if number % world == rank and number not in done]
        for number, part in tqdm(own, desc=self.what, unit=" pools", disable=None if progress else True):
            if enough():
                return
            self._store(number, make(part.tolist()))

    def shards(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Numbers and contents of the pools, in order; what is damaged is passed over with a warning."""
        for path in sorted(self.folder.glob(_SHARDS)):
            try:
                shard = load_file(path)
            except (SafetensorError, OSError) as error:
                shard, reason = {}, str(error)
            else:
                reason = "it lacks columns"
            if not shard.keys() >= self.columns | self.each:
                warnings.warn(f"{path} is damaged and passed over ({reason}): it is made again next time", stacklevel=2)
                continue
            yield int(path.name.split(".")[1]), shard

    def look(self, number: int, names: Iterable[str]) -> dict[str, Tensor] | None:
        """Some tensors of one pool, without reading the others; None where it is missing or damaged."""
        try:
            with safe_open(self._path(number), "pt") as shard:
                return {name: shard.get_tensor(name) for name in names}
        except (SafetensorError, OSError):
            return None

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the pools were made with, and the findings of all of them in order.

        Raises:
            FileNotFoundError: there is no note, or no finding. ValueError: the note is damaged.
        """
        note = self.existing_note()
        parts = [{name: shard[name] for name in self.columns} for _, shard in self.shards()]
        if not sum(len(part["index"]) for part in parts):
            raise FileNotFoundError(f"{self.folder} holds no {self.what} yet: let {self.maker} come to its end first")
        return note, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _path(self, number: int) -> Path:
        return self.folder / f"pool.{number:06d}.safetensors"

    def _store(self, number: int, shard: dict[str, Tensor]) -> None:
        assert shard.keys() == self.columns | self.each
        place = self._path(number)
        part = place.with_name(f".{place.name}.part")
        save_file({name: value.detach().cpu().contiguous() for name, value in shard.items()}, part)
        os.replace(part, place)


def share(rank: int | None, world: int | None) -> tuple[int, int]:
    """Number of this process and of all; None: as the environment's RANK and WORLD_SIZE say, else the only one.

    Raises:
        ValueError: there is no such process.
    """
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, world = {world}), got {rank}")
    return rank, world


def own_device(device: str) -> str:
    """A device of this process's own, by the environment's LOCAL_RANK, where only its kind is given."""
    local = os.environ.get("LOCAL_RANK")
    return f"{device}:{local}" if device == "cuda" and local is not None else device


def check_least(least: int, **values: int | None) -> None:
    """Refuse numbers below ``least``; None passes.

    Raises:
        ValueError: names the first of them.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


class InMemory(Dataset[Columns], Generic[Columns]):
    """Rows in memory, a named tuple of columns of one length, gathered a whole batch at a time."""

    def __init__(self, pairs: Columns) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs[0])

    def __getitem__(self, place: int) -> Columns:
        """One row, without the batch dimension."""
        return self._made(column[place] for column in self.pairs)

    def __getitems__(self, places: Sequence[int]) -> Columns:
        """A batch in one piece; the loader prefers this to single rows."""
        chosen = torch.as_tensor(places, dtype=torch.int64)
        return self._made(column[chosen] for column in self.pairs)

    def loader(self, batch_size: int, seed: int, sampler: Sampler[int] | None = None) -> DataLoader[Columns]:
        """Batches in the sampler's order, else in their own."""
        generator = torch.Generator().manual_seed(seed)  # its own: loading must not move the global one
        return DataLoader(self, batch_size, sampler=sampler, collate_fn=_as_it_is, generator=generator)

    def _made(self, columns: Iterable[Tensor]) -> Columns:
        kind: Callable[..., Columns] = type(self.pairs)
        return kind(*columns)


def _as_it_is(batch: Any) -> Any:
    return batch  # gathered in one piece already
