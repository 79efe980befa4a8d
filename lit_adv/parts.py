"""Some of the rows of a state, for attacks whose rows stand in different phases."""

from __future__ import annotations

from torch import Tensor

from lit_adv.losses import is_adversarial
from lit_adv.search import Search
from lit_adv.state import State


def places_of(mask: Tensor) -> Tensor:
    """Where a mask (n,) is True."""
    return mask.nonzero().squeeze(1)


def wide(value: Tensor, like: Tensor) -> Tensor:
    """One number a row, (n,), to be multiplied with images (n, C, H, W)."""
    return value.to(like.dtype)[:, None, None, None]


def rows_of(value: Tensor, rows: Tensor) -> Tensor:
    """The entries of some rows; where these are all, the very tensor, which is then not to be written to."""
    return value if len(rows) == len(value) else value[rows]


def part_of(state: State, rows: Tensor) -> State:
    """What a search must know of some rows that ask."""
    target = None if state.target is None else rows_of(state.target, rows)
    x0, flags = rows_of(state.x0, rows), rows_of(state.done, rows)
    y, places, t = (rows_of(value, rows) for value in (state.y, state.rows, state.t))
    return State(x=x0, x0=x0, y=y, target=target, rows=places, t=t, done=flags, inside=flags)


def won_by(label: Tensor, part: State, search: Search) -> Tensor:
    """Whether each answer is adversarial; one that is not known is not."""
    return is_adversarial(label, part.y, part.target, search.reject) & (label >= 0)
