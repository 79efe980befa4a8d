"""Pools on disk and in memory, where no test of those who use them looks."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import lit_adv.pools as module
from lit_adv.pools import InMemory, Pools, check_least, own_device, share


class Row(NamedTuple):
    """Two columns."""

    number: Tensor
    square: Tensor


def pools(folder: Path) -> Pools:
    return Pools(
        folder, "note.json", "squares", "a command", frozenset({"index", "square"}), frozenset({"tried"}), dict
    )


def squares(places: list[int]) -> dict[str, Tensor]:
    """Even places are found, and their squares."""
    tried = torch.tensor(places)
    found = tried[tried % 2 == 0]
    return {"tried": tried, "index": found, "square": found**2}


def fill(folder: Path, images: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    asked: list[list[int]] = []

    def make(places: list[int]) -> dict[str, Tensor]:
        asked.append(places)
        return squares(places)

    pools(folder).begin({"a": 1}, rank)
    pools(folder).fill(torch.arange(images), 4, make, rank, world)
    return asked


def test_each_process_makes_its_pools_and_only_what_is_missing(tmp_path: Path) -> None:
    assert fill(tmp_path, 10, 1, 2) == [[4, 5, 6, 7]]
    assert fill(tmp_path, 10) == [[0, 1, 2, 3], [8, 9]]
    assert fill(tmp_path, 10) == []
    assert fill(tmp_path, 11) == [[8, 9, 10]]  # the last one has grown
    assert fill(tmp_path, 5) == []
    note, columns = pools(tmp_path).read()
    assert note == {"a": 1}
    assert columns["square"].tolist() == [0, 4, 16, 36, 64, 100]
    assert [number for number, _ in pools(tmp_path).shards()] == [0, 1, 2]
    look = pools(tmp_path).look(1, ["index"])
    assert look is not None
    assert look["index"].tolist() == [4, 6]
    assert pools(tmp_path).look(3, ["index"]) is None
    assert pools(tmp_path).look(1, ["colour"]) is None


def test_enough_ends_the_work_before_the_next_pool(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def make(places: list[int]) -> dict[str, Tensor]:
        asked.append(places)
        return squares(places)

    pools(tmp_path).begin({}, 0)
    pools(tmp_path).fill(torch.arange(20), 4, make, 0, 1, enough=lambda: len(asked) == 2)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_rows_are_gathered_as_they_are_named() -> None:
    data = InMemory(Row(torch.arange(5), torch.arange(5) ** 2))
    assert len(data) == 5
    batch = data.__getitems__([3, 1])
    assert isinstance(batch, Row)
    assert batch.square.tolist() == [9, 1]
    assert data[4].square == 16
    state = torch.get_rng_state()
    assert [batch.number.tolist() for batch in data.loader(2, 0)] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_and_numbers_out_of_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert share(None, None) == (2, 3)
    assert share(0, None) == (0, 3)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, world = 2\), got 2"):
        share(None, 2)
    check_least(1, images=1, wanted=None)
    with pytest.raises(ValueError, match="pool must be at least 1, got 0"):
        check_least(1, images=1, pool=0)


def test_what_the_environment_says_must_be_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="the environment's RANK must be a whole number, got 'x': unset it"):
        share(None, None)
    assert share(1, 2) == (1, 2)


def test_pools_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        fill(tmp_path, 4)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"note.json": 0o640, "pool.000000.safetensors": 0o640}


def test_what_may_not_be_read_is_not_taken_for_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 4)

    def forbidden(*_: object) -> None:
        raise PermissionError("no")

    for name in ("load_file", "safe_open"):
        monkeypatch.setattr(module, name, forbidden)
    for ask in (
        lambda: list(pools(tmp_path).shards()),
        lambda: pools(tmp_path).look(0, ["index"]),
        pools(tmp_path).read,
    ):
        with pytest.raises(PermissionError):
            ask()  # type: ignore[no-untyped-call]


def test_a_full_disk_names_the_folder_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 4)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError, match=rf"cannot write pool.000001.safetensors to {tmp_path} \(.*left.*\): free the disk"
    ):
        fill(tmp_path, 8)


def test_a_pool_that_is_missing_is_told_or_refused(tmp_path: Path) -> None:
    fill(tmp_path, 12)
    (tmp_path / "pool.000001.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"pool.000001.safetensors is missing: it is made next time"):
        _, columns = pools(tmp_path).read()
    assert columns["index"].tolist() == [0, 2, 8, 10]
    with pytest.raises(
        ValueError, match=r"pool.000001.safetensors is missing, so the squares are not those of a whole"
    ):
        dataclasses.replace(pools(tmp_path), whole=True).read()


@pytest.mark.parametrize(
    ("device", "local", "own"),
    [("cuda", "1", "cuda:1"), ("cuda", None, "cuda"), ("cuda:3", "1", "cuda:3"), ("cpu", "1", "cpu")],
)
def test_each_process_has_a_device_of_its_own(
    device: str, local: str | None, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert own_device(device) == own
