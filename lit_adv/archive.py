"""What an evaluation has found so far, on disk, so that a broken run goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_adv.attack import Attack


class Archive:
    """Records of finished images as lines of JSON, and their images in safetensors shards.

    A run is known by the hash of all that decides its result; a run with other weights, another attack or other data
    lies in a folder of its own. Lines are appended as images finish; shards appear whole or not at all.

    Args:
        folder: where the runs of one attack lie.
        identity: what decides the result, ready for JSON; its hash names the run's folder.
        rank: of this process, which writes files of its own and reads those of all.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.rank = rank
        self._failed = False
        self._attempt(lambda: self._begin(text))

    def _begin(self, identity: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"identity.rank{self.rank}.json").write_text(identity)

    def load(self) -> dict[int, dict[str, Any]]:
        """Rows of all images finished before, by place in the data set; a line cut short is passed over."""
        rows: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("rank*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                    rows[int(row["index"])] = row  # a newer line stands for other pixels under the same index
                except (ValueError, KeyError, TypeError):
                    continue  # the run was stopped while it wrote this line
        return rows

    def images(self, wanted: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Clean and returned images by place in the data set, of the wanted places that are there."""
        found: dict[int, dict[str, Tensor]] = {}
        for path in sorted(self.folder.glob("rank*.safetensors"), key=lambda path: path.stat().st_mtime):
            with safe_open(path, "pt") as shard:
                places = {index: place for place, index in enumerate(shard.get_tensor("index").tolist())}
                for index in places.keys() & set(wanted):
                    found[index] = {name: shard.get_slice(name)[places[index]] for name in shard.keys()}  # noqa: SIM118
        return found

    def counts(self) -> dict[int, dict[str, tuple[int, int]]]:
        """How often what happened, of how many times, as each process has kept it."""
        found: dict[int, dict[str, tuple[int, int]]] = {}
        for path in self.folder.glob("counts.rank*.json"):
            try:
                pairs = {name: (int(pair[0]), int(pair[1])) for name, pair in json.loads(path.read_text()).items()}
                found[int(path.name.split(".")[1].removeprefix("rank"))] = pairs
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue  # a damaged file costs a remark, no result
        return found

    def keep(self, counts: Mapping[str, tuple[int, int]]) -> None:
        """Write down this process's counts, in place of those before."""
        self._attempt(lambda: self._replace(json.dumps(counts)))

    def _replace(self, text: str) -> None:
        part = self.folder / f"counts.rank{self.rank}.part"
        part.write_text(text)
        os.replace(part, part.with_suffix(".json"))

    def append(self, rows: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Add finished images: their shard first, then their lines, which make them count."""
        self._attempt(lambda: self._write(rows, tensors))

    def _write(self, rows: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        if len(tensors.get("index", ())):
            numbers = [int(path.name.split(".")[1]) for path in self.folder.glob(f"rank{self.rank}.*.safetensors")]
            number = max(numbers, default=-1) + 1
            place = self.folder / f"rank{self.rank}.{number:06d}.safetensors"
            part = place.with_suffix(".part")
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, part)
            os.replace(part, place)
        with (self.folder / f"rank{self.rank}.jsonl").open("ab+") as file:
            cut = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n"
            file.write(b"\n" * cut + "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write; a full or read-only disk costs the possibility to resume, not what was computed."""
        if self._failed:
            return
        try:
            write()
        except (OSError, SafetensorError) as error:
            self._failed = True
            warnings.warn(
                f"cannot write to {self.folder} ({error}): the run goes on and its results are kept in memory, but it "
                "cannot be resumed; free the disk or choose another dirpath",
                stacklevel=3,
            )


def fingerprint(image: Tensor, label: int) -> str:
    """Hash of an image and its label: what a record under this index must have been made from."""
    pixels = image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(pixels + str(label).encode(), digest_size=8).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Hash of a network: its modules' classes and plain settings, weights and buffers; the same on every device."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        plain = {key: value for key, value in sorted(vars(module).items()) if _is_setting(key, value)}
        digest.update(f"{name} {type(module).__qualname__} {plain}".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def learnt(attack: Attack) -> dict[str, Any]:
    """What decides an attack's results beside its arguments: what it has learnt, and its local models' weights."""
    local = [weights_hash(model) for model in getattr(attack, "models", [])]
    found = {"fitted_on": attack.fitted_on, "local": local}
    return {name: value for name, value in found.items() if value}


def _is_setting(key: str, value: Any) -> bool:
    if key.startswith("_") or key == "training":
        return False
    if isinstance(value, list | tuple):
        return all(_is_setting("item", item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def configuration(thing: Any) -> Any:
    """An object as plain data: its class path and the arguments it was made with, ready for JSON.

    Objects keep their constructor's arguments under the arguments' names.
    """
    if thing is None or isinstance(thing, bool | int | str):
        return thing
    if isinstance(thing, float):
        return thing if abs(thing) != float("inf") and thing == thing else str(thing)
    if isinstance(thing, Path):
        return str(thing)
    if isinstance(thing, Mapping):
        return {str(key): configuration(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [configuration(value) for value in thing]
    if isinstance(thing, functools.partial):
        return {
            "function": configuration(thing.func),
            "args": configuration(thing.args),
            **configuration(thing.keywords),
        }
    if callable(thing) and hasattr(thing, "__qualname__"):
        if "<lambda>" in thing.__qualname__:
            raise ValueError(
                f"{thing.__qualname__} of {thing.__module__} has no name to be known by: define a function"
            )
        return f"{thing.__module__}.{thing.__qualname__}"
    return _constructed(thing)


def _constructed(thing: Any) -> dict[str, Any]:
    names = [name for name in inspect.signature(type(thing).__init__).parameters if name != "self"]
    arguments = {name: configuration(getattr(thing, name)) for name in names if hasattr(thing, name)}
    return {"class_path": f"{type(thing).__module__}.{type(thing).__qualname__}", "init_args": arguments}
