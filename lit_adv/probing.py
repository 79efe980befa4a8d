"""An estimate from values, asked a block of probes at a time within the one loop of all attacks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lit_adv.estimator import GradientEstimator, ProbeEstimator
from lit_adv.losses import Loss, margin, margin_to, rival
from lit_adv.search import Search
from lit_adv.state import State


@dataclass(kw_only=True)
class ProbingState(State):
    """Adds what the blocks of an estimate so far have left.

    Attributes:
        memory: (n, ...) the estimator's. phase: (n,) blocks asked of this estimate. total: (n, ...) their sum.
        value: (n,) of the loss at ``x``. rival: (n,) class that the margin is taken against.
    """

    memory: Tensor
    phase: Tensor
    total: Tensor
    value: Tensor
    rival: Tensor


def probing_fields(estimator: GradientEstimator, x: Tensor) -> dict[str, Any]:
    """The fields that :class:`ProbingState` adds, for rows that begin at ``x``."""
    place = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    total = estimator.empty(x) if isinstance(estimator, ProbeEstimator) else x.new_zeros(len(x), 0)
    value = torch.full((len(x),), torch.nan, dtype=x.dtype, device=x.device)
    return {"memory": estimator.init(x), "phase": place, "total": total, "value": value, "rival": place}


def probe(search: Search, state: ProbingState, estimator: ProbeEstimator, loss: Loss) -> tuple[Tensor, Tensor | None]:
    """Ask the next block of each row: the gradient (n, C, H, W), and for which rows it is complete (None: all).

    The point itself is asked with its first block, as a candidate and a check; so is every probe a candidate.
    """
    blocks = estimator.blocks(state.x.shape[1:])
    first = state.phase * blocks.size
    images = state.x.new_empty(len(state), blocks.size + 1, *state.x.shape[1:])
    images[:, 0] = state.x
    probes = images[:, 1:]
    told = estimator.ask(state.x, state.memory, search.draws(state), first, probes)
    if estimator.clip == "box":
        probes.clamp_(*search.threat.box)
    elif estimator.clip == "ball":
        probes.copy_(search.threat.project(probes, state.x0))
    once = blocks.count == 1 and blocks.size == blocks.total
    check = _first_column(len(state), blocks.size + 1, state.x.device)
    begins = check[:, 0] if blocks.count == 1 else state.phase == 0
    asked = None if once else torch.cat([begins[:, None], blocks.numbers(state.phase) < blocks.total], 1)
    scores = search.scores(images, state, check=check, asked=asked)
    values = _values(search, state, scores, begins, loss, blocks.count == 1)
    gathered = estimator.gather(told, probes, values, state.x, state.value)
    if blocks.count == 1:
        gradient, state.memory = estimator.finish(gathered, state.x, state.memory)
        return gradient, None
    total = state.total + gathered
    state.phase = state.phase + 1
    complete = state.phase == blocks.count
    state.inside = ~complete
    gradient, memory = estimator.finish(total, state.x, state.memory)
    state.memory = torch.where(_rows(complete, memory), memory, state.memory)
    state.total = torch.where(_rows(complete, total), 0.0, total)
    state.phase = torch.where(complete, 0, state.phase)
    return gradient, complete


def _values(search: Search, state: ProbingState, scores: Tensor, begins: Tensor, loss: Loss, all_begin: bool) -> Tensor:
    """The loss of the probes; that of the point itself is remembered, and the class margins are taken against."""
    if scores.shape[-1] < 2:
        return scores[:, 1:, 0]  # the budget covered nothing at all
    if loss is margin:
        best = rival(scores[:, 0].nan_to_num(-torch.inf), state.y, state.target, search.reject)
        state.rival = best if all_begin else torch.where(begins, best, state.rival)
        values = margin_to(state.rival, scores, state.y, state.target, search.reject)
    else:
        values = loss(scores, state.y, state.target, search.reject)
    value = values[:, 0].to(state.value.dtype)
    state.value = value if all_begin else torch.where(begins, value, state.value)
    return values[:, 1:]


@lru_cache(maxsize=64)
def _first_column(rows: int, columns: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        mask[:, 0] = True
        return mask


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))
