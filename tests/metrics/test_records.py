"""Records survive every trip they make: rows, JSON, packing, processes."""

from __future__ import annotations

import json
import math
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lit_adv.metrics import AttackRecords, Records


def make(index: list[int], **columns: Any) -> Records:
    n = len(index)
    ints, flags = torch.arange(n), torch.arange(n) % 2 == 0
    values: dict[str, Any] = {
        "index": torch.tensor(index, dtype=torch.int64),
        "label": ints % 10,
        "target": torch.full((n,), -1),
        "clean_correct": torch.ones(n, dtype=torch.bool),
        "claimed": flags,
        "verified": flags,
        "verified_any": flags,
        "verified_mean": torch.rand(n, dtype=torch.float64),
        "rounded": flags,
        "distance": torch.where(flags, torch.rand(n, dtype=torch.float64), math.inf),
        "l2": torch.rand(n, dtype=torch.float64),
        "linf": torch.full((n,), 8 / 255, dtype=torch.float64),
        "queries": ints + 1,
        "checks": ints * 0,
        "first_hit": torch.where(flags, ints + 1, -1),
        "iterations": ints,
    }
    return Records(**{**values, **columns})


def same(a: Records, b: Records) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(columns(a), columns(b), strict=True))


def columns(records: Records) -> list[torch.Tensor]:
    return list(records.columns().values())


def test_rows_go_through_strict_json() -> None:
    records = make([4, 2, 9])
    text = json.dumps(records.rows(), allow_nan=False)
    assert same(Records.from_rows(json.loads(text)), records)
    assert records.rows()[1]["distance"] is None
    assert records.rows()[0]["claimed"] is True


@pytest.mark.parametrize("index", [[], [7], [3, 1, 2**52]])
def test_packing_loses_nothing(index: list[int]) -> None:
    records = make(index)
    assert records.pack().shape == (len(index), 16)
    assert same(Records.unpack(records.pack()), records)


def test_unique_keeps_the_first_row_of_an_index() -> None:
    records = make([5, 3, 5, 1, 3], queries=torch.tensor([10, 20, 30, 40, 50]))
    assert records.unique().index.tolist() == [1, 3, 5]
    assert records.unique().queries.tolist() == [40, 20, 10]


def test_cat_select_and_empty() -> None:
    first, second = make([1, 2]), make([3])
    joined = Records.cat([first, second])
    assert len(joined) == 3
    assert same(joined[joined.index == 3], second)
    assert same(joined[:2], first)
    assert same(Records.cat([]), Records.empty())
    assert same(Records.from_rows([]), Records.empty())
    assert len(Records.empty().unique()) == 0
    assert Records.empty().rows() == []


def test_columns_get_their_types() -> None:
    records = make([0], queries=torch.tensor([3.0]), distance=torch.tensor([0.5], dtype=torch.float32))
    assert records.queries.dtype == torch.int64
    assert records.distance.dtype == torch.float64


def test_bad_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"queries must be 1-D and as long as index \(2 rows\), got shape \(1,\)"):
        make([1, 2], queries=torch.tensor([1]))
    with pytest.raises(ValueError, match="must have the column 'label'"):
        Records.from_rows([{"index": 1}])
    row = make([1]).rows()[0]
    with pytest.raises(ValueError, match=r"'queries' of a record must be .*, got 'many'"):
        Records.from_rows([{**row, "queries": "many"}])


def test_metric_gathers_updates() -> None:
    metric = AttackRecords()
    assert same(metric.compute(), Records.empty())
    first, second = make([8, 2]), make([5])
    for part in (first, Records.empty(), second, first):
        metric.update(part)
    expected = Records.cat([first, second]).unique()
    assert same(metric.compute(), expected)
    assert same(pickle.loads(pickle.dumps(metric)).compute(), expected)
    assert same(metric.half().compute(), expected)
    metric.reset()
    assert len(metric.compute()) == 0


def test_metric_keeps_one_row_one_dimensional() -> None:
    metric = AttackRecords()
    metric.update(make([3]))
    assert metric.compute().index.shape == (1,)


def shares() -> list[list[Records]]:
    """What each of two processes holds, in three rounds; rows that both hold are equal."""
    torch.manual_seed(0)
    whole = make(list(range(7)))
    nothing = Records.empty()
    return [[whole, nothing], [whole[:5], whole[2:]], [nothing, nothing]]


def exchange(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        for number, parts in enumerate(shares()):
            metric = AttackRecords()
            if len(parts[rank]):  # the process without rows never updates
                metric.update(parts[rank][:1])
                metric.update(parts[rank][1:])
            gathered = metric.compute()
            assert len(metric.packed) == (2 if len(parts[rank]) else 1)
            torch.save(gathered.pack(), f"{folder}/{number}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_share_rows(tmp_path: Path) -> None:
    mp.spawn(exchange, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for number, parts in enumerate(shares()):
        for rank in range(2):
            gathered = Records.unpack(torch.load(tmp_path / f"{number}-{rank}.pt"))
            assert same(gathered, Records.cat(parts).unique())
