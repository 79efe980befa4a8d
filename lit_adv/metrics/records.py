"""Records: what an attack did to each image of an evaluated set, and the metric that gathers them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_DTYPES = {
    "index": torch.int64,
    "label": torch.int64,
    "target": torch.int64,
    "clean_correct": torch.bool,
    "claimed": torch.bool,
    "verified": torch.bool,
    "verified_any": torch.bool,
    "verified_mean": torch.float64,
    "rounded": torch.bool,
    "distance": torch.float64,
    "l2": torch.float64,
    "linf": torch.float64,
    "queries": torch.int64,
    "checks": torch.int64,
    "first_hit": torch.int64,
    "iterations": torch.int64,
}


@dataclass(frozen=True, eq=False)
class Records:
    """One row per image of the evaluated set.

    Columns are 1-D tensors of one length; they are moved to the CPU and given their column's dtype. An image
    wrong at first is never attacked: it is broken at distance 0 with no query, and never a success.

    Args:
        index: Place in the data set, the key of a row.
        label: True class.
        target: Target class, -1 where untargeted.
        clean_correct: Whether the clean image was classified rightly.
        claimed: Whether the attack says it succeeded.
        verified: Whether an independent second pass agrees; for a random model, whether the image is
            adversarial in more than half of the fresh draws.
        verified_any: Whether it is adversarial in any of the draws.
        verified_mean: Share of the draws in which it is adversarial, in [0, 1].
        rounded: Whether it is still adversarial after rounding to 8 bits.
        distance: Distance in the threat model's norm, inf if nothing was found.
        l2: Euclidean norm of the perturbation returned.
        linf: Largest change of a value in the perturbation returned.
        queries: Images sent to the model, all that the image cost.
        checks: Those of them that a paper's arithmetic leaves out.
        first_hit: Queries spent when it was first adversarial within the threat model, -1 if it never was.
        iterations: Steps taken until the first hit, or in all.

    Shape:
        Every column (n,).

    Raises:
        ValueError: If a column is not 1-D or the columns differ in length.
    """

    index: Tensor
    label: Tensor
    target: Tensor
    clean_correct: Tensor
    claimed: Tensor
    verified: Tensor
    verified_any: Tensor
    verified_mean: Tensor
    rounded: Tensor
    distance: Tensor
    l2: Tensor
    linf: Tensor
    queries: Tensor
    checks: Tensor
    first_hit: Tensor
    iterations: Tensor

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            column = torch.as_tensor(getattr(self, name)).detach().to("cpu", dtype)
            if column.ndim != 1 or len(column) != len(self.index):
                shape, rows = tuple(column.shape), len(self.index)
                raise ValueError(f"{name} must be 1-D and as long as index ({rows} rows), got shape {shape}")
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor | slice) -> Records:
        """Return the rows picked by a boolean mask, by integer places, or by a slice."""
        return Records(**{name: column[rows] for name, column in self.columns().items()})

    def columns(self) -> dict[str, Tensor]:
        """Return the columns by name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per row, ready for JSON: an infinite number (nothing found) becomes None."""
        columns = [[_plain(value) for value in column.tolist()] for column in self.columns().values()]
        return [dict(zip(_DTYPES, values, strict=True)) for values in zip(*columns, strict=True)]

    def unique(self) -> Records:
        """Return one row per index, sorted by index; the first row of an index wins."""
        order = torch.sort(self.index, stable=True).indices
        index = self.index[order]
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return self[order[first]]

    @classmethod
    def empty(cls) -> Records:
        """Return records of no image."""
        return cls(**{name: torch.empty(0, dtype=dtype) for name, dtype in _DTYPES.items()})

    @classmethod
    def cat(cls, parts: Iterable[Records]) -> Records:
        """Join records one after another; none give empty records."""
        columns = [part.columns() for part in (cls.empty(), *parts)]
        return cls(**{name: torch.cat([column[name] for column in columns]) for name in _DTYPES})

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Records:
        """Rebuild records from ``rows()``, also after a round trip through JSON or CSV.

        Args:
            rows: One mapping per image with a value for every column; further keys are ignored. None and the
                empty string stand for an infinite number, 0 and 1 for booleans.

        Raises:
            ValueError: If a row lacks a column or holds a value that does not fit it.
        """
        columns = {name: [_parse(row, name, dtype) for row in rows] for name, dtype in _DTYPES.items()}
        return cls(**{name: torch.tensor(column, dtype=_DTYPES[name]) for name, column in columns.items()})

    def pack(self) -> Tensor:
        """Return all columns in one int64 matrix (n, 16); nothing is lost, floats are kept as their bits."""
        return torch.stack([_bits(column) for column in self.columns().values()], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor) -> Records:
        """Undo ``pack``."""
        columns = zip(_DTYPES.items(), packed.cpu().unbind(dim=1), strict=True)
        return cls(
            **{
                name: column.contiguous().view(torch.float64) if dtype == torch.float64 else column.to(dtype)
                for (name, dtype), column in columns
            }
        )


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(row: Mapping[str, Any], name: str, dtype: torch.dtype) -> float | int | bool:
    if name not in row:
        raise ValueError(f"a record must have the column {name!r}, got only {sorted(row)}")
    value = row[name]
    try:
        if dtype == torch.float64:
            return math.inf if value is None or value == "" else float(value)
        return bool(int(value)) if dtype == torch.bool else int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the column {name!r} of a record must be {dtype}, got {value!r}") from error


def _bits(column: Tensor) -> Tensor:
    return column.view(torch.int64) if column.dtype == torch.float64 else column.to(torch.int64)


class AttackRecords(Metric):
    """Gathers records over batches and processes.

    Rows travel as one integer matrix, so that float64 columns arrive bit for bit on any device. A process
    without rows takes part in the exchange with an empty matrix.
    """

    full_state_update = False
    packed: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("packed", default=[], dist_reduce_fx="cat")

    def update(self, records: Records) -> None:
        """Add records of some images, possibly none."""
        cast(list[Tensor], self.packed).append(records.pack().to(self.device))

    def compute(self) -> Records:
        """Return the records of all processes, one per index and sorted by it."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            packed = dim_zero_cat(self.packed) if len(self.packed) else Records.empty().pack()
            return Records.unpack(packed).unique()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Exchange rows with the other processes; one without rows sends an empty matrix."""
        if isinstance(self.packed, list) and not self.packed:
            self.packed.append(Records.empty().pack().to(self.device))
        super().sync(*args, **kwargs)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # The library's wrapper squeezes columns of one row to scalars and refuses frozen dataclasses, so
        # compute exchanges rows itself.
        return compute
