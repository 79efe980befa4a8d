"""What white-box attacks ask: gradients of a loss or of several scores, averaged over a random model's draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_adv.differentiable import Directions
from lit_adv.result import BAD_GRADIENT, ZERO_GRADIENT
from lit_adv.search import Search
from lit_adv.state import State


def gradient_of(
    search: Search, state: State, loss: Callable[[Tensor], Tensor], eot: int = 1, x: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient and the scores at images of the state's rows, from one forward and one backward.

    One query a draw; memory is bounded by the oracle's chunk, whatever ``eot``.

    Args:
        loss: of scores (n, eot, K) -> (n, eot), averaged over the draws; no row may see another.
        eot: draws of a random model.
        x: images (n, C, H, W); None: the state's own.

    Returns:
        Loss (n,), gradient (n, C, H, W) and scores (n, eot, K), detached.
    """
    leaf = (state.x if x is None else x).detach().requires_grad_()
    with torch.enable_grad():
        scores = search.scores(leaf.unsqueeze(1).expand(len(leaf), eot, *leaf.shape[1:]), state)
        value = loss(scores).mean(1)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    examine(search, state, gradient)
    return value.detach(), gradient, scores.detach()


def gradients_of(
    search: Search, state: State, directions: Directions, eot: int = 1, x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and the gradients of ``k`` weighted sums of them, from one forward and one batched backward.

    Args:
        directions: ``(scores (m, K), rows (m,)) -> (m, k, K)``, the weights of the sums, as each draw has them; rows
            are places in the state.
        eot, x: as in :func:`gradient_of`.

    Returns:
        Scores (n, eot, K), and gradients (n, k, C, H, W) averaged over the draws.
    """
    found: list[Tensor] = []

    def ask(images: Tensor, rows: Tensor) -> Tensor:
        answer, gradient = search.oracle.jacobian(images.detach(), rows, directions)
        found.append(gradient)
        return answer

    leaf = (state.x if x is None else x).detach()
    asked = leaf.unsqueeze(1).expand(len(leaf), eot, *leaf.shape[1:]).requires_grad_()  # says that gradients are wanted
    scores = search.ask(ask, asked, state)
    examine(search, state, found[0])
    return scores.detach(), found[0]


def clean_scores(search: Search, rows: Tensor, more: int = 1) -> Tensor:
    """Scores of the clean images of rows about to start, (n, K), asked once a call and as a check.

    Args:
        more: queries that the first step costs. Where both cannot be paid nothing is asked: NaN.
    """
    known = search.clean
    fresh = rows if known is None else rows[known[rows].isnan().all(1)]
    fresh = fresh[search.oracle.remaining(fresh, gradient=True) >= search.oracle.answers + more]
    if len(fresh):
        fields = search.fresh(fresh)
        told = search.scores(fields["x"], State(**fields), check=True)
        if known is None:
            known = search.clean = told.new_full((len(search.x0), told.shape[-1]), torch.nan)
        known[fresh] = told
    return search.x0.new_full((len(rows), 1), torch.nan) if known is None else known[rows]


def examine(search: Search, state: State, gradient: Tensor) -> None:
    """Note gradients (n, ..., C, H, W) that lead nowhere, for the report and a warning."""
    if not search.watch:
        return
    size = gradient.flatten(1).abs().sum(1)
    zero, lost = size == 0, ~size.isfinite()
    search.count(ZERO_GRADIENT, zero)
    search.count(BAD_GRADIENT, lost)
    search.blind[state.rows] |= zero | lost
