"""Work in pools: what is finished stands whole in a file of its own, beside a note of what all was made with."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from lit_adv.fingerprint import digest

_SHARDS = "pool.*.safetensors"
_NUMBERED = re.compile(r"pool\.(\d{6,})\.safetensors")
_WANTED = "wanted.json"

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
        later: entries of the note's "data" that notes of an earlier version lack; compared where both have them.
        whole: refuse to read where a pool is missing or damaged; False: warn.
        wins: the boolean column of findings that count towards what was wanted, if that can be said.
    """

    folder: Path
    name: str
    what: str
    maker: str
    columns: frozenset[str]
    each: frozenset[str]
    checked: Callable[[dict[str, Any]], dict[str, Any]]
    later: frozenset[str] = frozenset()
    whole: bool = False
    wins: str | None = None

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

    def begin(self, note: dict[str, Any], rank: int, wanted: int | None = None) -> None:
        """Write down what the pools are made with, or refuse a folder made with something else.

        Args:
            rank: of this process.
            wanted: so many wins are served, up to the end of a pool; None: all. A folder's number grows only.
        """
        self.refuse(note)
        known = self.wanted()
        if self.note() is None:
            if wanted is not None:  # before the note: where that stands, this does too
                self._write(_WANTED, json.dumps({"wanted": wanted}).encode(), rank)
            self._write(self.name, json.dumps(note, indent=1).encode(), rank)
        elif known is not None and wanted is None:
            (self.folder / _WANTED).unlink(missing_ok=True)
        elif known is not None and wanted is not None and wanted > known:
            self._write(_WANTED, json.dumps({"wanted": wanted}).encode(), rank)

    def wanted(self) -> int | None:
        """How many wins are served, up to the end of a pool; None: all.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.folder / _WANTED
        try:
            return int(json.loads(path.read_text())["wanted"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and make the {self.what} again") from None

    def refuse(self, note: dict[str, Any], but: Iterable[str] = ()) -> None:
        """Refuse a folder made with something else; ``but`` names entries that are not compared.

        Raises:
            ValueError: names the entries that differ.
        """
        there = self.note()
        if there is None:
            return
        given = json.loads(json.dumps(note))
        for name in self.later:
            if not (name in given["data"] and name in there["data"]):
                for entries in (given, there):
                    entries["data"].pop(name, None)
        names = (given.keys() | there.keys()) - set(but)
        differing = [name for name in names if given.get(name) != there.get(name)]
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
        for number, path in self._numbered():
            shard, reason = self._load(path)
            if reason:
                warnings.warn(f"{path} is damaged and passed over ({reason}): it is made again next time", stacklevel=2)
                continue
            yield number, shard

    def look(self, number: int, names: Iterable[str]) -> dict[str, Tensor] | None:
        """Some tensors of one pool, without reading the others; None where it is missing or damaged."""
        try:
            with safe_open(self._path(number), "pt") as shard:
                return {name: shard.get_tensor(name) for name in names}
        except PermissionError:
            raise
        except (SafetensorError, OSError):
            return None

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the pools were made with, and their findings in order, up to the pool that completes what was wanted.

        Raises:
            FileNotFoundError: there is no note, or no finding. ValueError: the note is damaged, or a pool is missing
                or damaged where all must be there.
        """
        note, wanted = self.existing_note(), self.wanted()
        parts: list[dict[str, Tensor]] = []
        expected = wins = 0
        for number, path in self._numbered():
            shard, reason = self._load(path)
            missing = self._path(expected) if number > expected else None
            expected = number + 1
            if self.whole and (reason or missing):
                fault = f"{missing} is missing" if missing else f"{path} is damaged ({reason})"
                raise ValueError(
                    f"{fault}, so the {self.what} are not those of a whole run: run {self.maker} again as before, "
                    "every process to its end"
                )
            if missing:
                warnings.warn(f"{missing} is missing: it is made next time", stacklevel=2)
            if reason:
                warnings.warn(f"{path} is damaged and passed over ({reason}): it is made again next time", stacklevel=2)
                continue
            parts.append({name: shard[name] for name in self.columns})
            wins += int(shard[self.wins].sum()) if self.wins else 0
            if wanted is not None and wins >= wanted:
                break
        if not sum(len(part["index"]) for part in parts):
            raise FileNotFoundError(f"{self.folder} holds no {self.what} yet: let {self.maker} come to its end first")
        return note, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _numbered(self) -> list[tuple[int, Path]]:
        """The pools' numbers and files, in order."""
        found = []
        for path in self.folder.glob(_SHARDS):
            numbered = _NUMBERED.fullmatch(path.name)
            if numbered is None:
                warnings.warn(f"{path} is not named as a pool and passed over: remove it", stacklevel=3)
            else:
                found.append((int(numbered[1]), path))
        return sorted(found)

    def _load(self, path: Path) -> tuple[dict[str, Tensor], str]:
        """A pool's tensors, or none and what is wrong with it."""
        try:
            shard = load_file(path)
            if shard.keys() >= self.columns | self.each:
                return shard, ""
        except PermissionError:
            raise
        except (SafetensorError, OSError) as error:
            return {}, str(error)
        return {}, "it lacks columns"

    def _path(self, number: int) -> Path:
        return self.folder / f"pool.{number:06d}.safetensors"

    def _store(self, number: int, shard: dict[str, Tensor]) -> None:
        assert shard.keys() == self.columns | self.each
        content = save({name: value.detach().cpu().contiguous() for name, value in shard.items()})
        self._write(self._path(number).name, content)

    def _write(self, name: str, content: bytes, rank: int | None = None) -> None:
        """A file that is there as a whole or not at all, with the permissions of any new file."""
        part = self.folder / (f".{name}.part" if rank is None else f".{name}.rank{rank}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            os.replace(part, self.folder / name)
        except OSError as error:
            raise OSError(
                f"cannot write {name} to {self.folder} ({error}): free the disk or choose another folder; the same "
                "command goes on with what is there"
            ) from error


def known_by(labels: Tensor, ends: Tensor) -> dict[str, Any]:
    """What a data set's images are known by: how many, and a hash of all labels and of some images, ready for JSON.

    Shape: labels (N,); ends (k, C, H, W), the first and the last image.
    """
    found = digest({"labels": labels, "ends": ends}, "")
    return {"count": len(labels), "digest": bytes(found.tolist()).hex()[:16]}


def share(rank: int | None, world: int | None) -> tuple[int, int]:
    """Number of this process and of all; None: as the environment's RANK and WORLD_SIZE say, else the only one.

    Raises:
        ValueError: there is no such process, or the environment holds no whole numbers.
    """
    rank = _whole_number("RANK", 0) if rank is None else rank
    world = _whole_number("WORLD_SIZE", 1) if world is None else world
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, world = {world}), got {rank}")
    return rank, world


def _whole_number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"the environment's {name} must be a whole number, got {value!r}: unset it") from None


def moved(model: nn.Module, device: str | None) -> nn.Module:
    """The model on a device of this process's own; None: where it is.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return model
    try:
        return model.to(own_device(device))
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}): choose another, e.g. cpu") from None


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
