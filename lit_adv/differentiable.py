"""The gradient of an oracle's answers, in memory bounded by the chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_adv.chunk import Chunk
from lit_adv.draws import Draws


class Asked(Protocol):
    """What is needed of an oracle, see :class:`lit_adv.oracle.QueryOracle`."""

    model: nn.Module
    chunk_tuner: Chunk

    @property
    def chunk(self) -> int: ...

    def _now(self, device: torch.device) -> float: ...

    def _differentiated(self, x: Tensor, draws: Draws | None) -> Tensor: ...

    def _checked(self, answer: Tensor, images: int) -> Tensor: ...

    def _as_scores(self, answer: Tensor) -> Tensor: ...

    def _in_chunks(
        self, ask: Callable[[Tensor, Draws | None], Tensor], flat: Tensor, draws: Draws | None
    ) -> Tensor: ...


class Differentiable(torch.autograd.Function):
    """The surrogate in forwards of ``chunk`` images whose graphs never stand side by side.

    A single chunk keeps its graph and costs one forward and one backward. Several are run without grad and again,
    one by one, in the backward pass, so that memory is bounded by the chunk; running out of it halves the chunk.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, oracle: Asked, draws: Draws | None) -> Tensor:
        ctx.oracle, ctx.draws, ctx.flat, ctx.graph = oracle, draws, flat, None
        if len(flat) <= oracle.chunk_tuner.graph:  # rows taken up at a larger chunk stay, and go in one piece
            try:
                begun = oracle._now(flat.device)
                ctx.graph = _graph(oracle, flat, draws)
                ctx.seconds = oracle._now(flat.device) - begun
                return ctx.graph[1].detach()
            except torch.OutOfMemoryError:
                oracle.chunk_tuner.halve()
        return oracle._in_chunks(oracle._differentiated, flat, draws)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        oracle, flat = ctx.oracle, ctx.flat
        if ctx.graph is not None:
            leaf, answer = ctx.graph
            ctx.graph = None
            try:
                begun = oracle._now(flat.device)
                gradient = _gradient(oracle, answer, leaf, grad_output)
                oracle.chunk_tuner.fits = max(oracle.chunk_tuner.fits, len(flat))
                oracle.chunk_tuner.observe(len(flat), ctx.seconds + oracle._now(flat.device) - begun, backward=True)
                return gradient, None, None
            except torch.OutOfMemoryError:
                del leaf, answer
                oracle.chunk_tuner.halve()
        gradient = torch.empty_like(flat)
        done = 0
        while done < len(flat):
            part = slice(done, min(done + oracle.chunk, len(flat)))
            keyed = ctx.draws and ctx.draws[torch.arange(part.start, part.stop, device=flat.device)]
            try:
                leaf, answer = _graph(oracle, flat[part], keyed)
                gradient[part] = _gradient(oracle, answer, leaf, grad_output[part])
            except torch.OutOfMemoryError:
                oracle.chunk_tuner.halve()
                continue
            done = part.stop
        return gradient, None, None


Directions = Callable[[Tensor, Tensor], Tensor]
"""``(scores (m, K), rows (m,)) -> (m, k, K)``: the weighted sums of scores to be differentiated, and how weighted."""


def products(
    oracle: Asked, x: Tensor, draws: Draws | None, directions: Directions, batched: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Scores, and the gradients of ``k`` weighted sums of them, from one forward and one batched backward a chunk.

    Args:
        x: (n, s, C, H, W), ``s`` draws of each image, over which gradients are averaged whatever the chunk.
        directions: which sums; it sees each draw's own scores.
        batched: all backwards as one; None: on an accelerator. A processor's caches make one by one the faster.

    Returns:
        Scores (n, s, K) and gradients (n, k, C, H, W).
    """
    n, samples = x.shape[:2]
    flat = x.flatten(0, 1)
    row = torch.arange(n, device=x.device).repeat_interleave(samples)
    batched = x.device.type != "cpu" if batched is None else batched
    scores: list[Tensor] = []
    total: Tensor | None = None
    done = 0
    while done < len(flat):
        part = slice(done, min(done + oracle.chunk, len(flat)))
        keyed = draws and draws[torch.arange(part.start, part.stop, device=flat.device)]
        try:
            leaf, answer = _graph(oracle, flat[part], keyed)
            with torch.enable_grad():
                told = oracle._as_scores(answer)
            gradient = _several(oracle, told, leaf, directions(told.detach(), row[part]), batched)
        except torch.OutOfMemoryError:
            oracle.chunk_tuner.halve()
            continue
        if total is None:
            total = gradient.new_zeros(n, *gradient.shape[1:])
        total.index_add_(0, row[part], gradient)
        scores.append(told.detach())
        done = part.stop
    assert total is not None
    return torch.cat(scores).view(n, samples, -1), total / samples


def _several(oracle: Asked, scores: Tensor, leaf: Tensor, weights: Tensor, batched: bool) -> Tensor:
    """Gradients of the weighted sums, (m, k, C, H, W)."""
    if batched:
        try:
            (found,) = torch.autograd.grad(
                scores, leaf, weights.transpose(0, 1), retain_graph=True, is_grads_batched=True, allow_unused=True
            )
            if found is None:
                raise no_gradient(oracle.model, len(leaf))
            return found.transpose(0, 1)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation of the model that knows no batches of gradients
            pass
    found = leaf.new_empty(len(leaf), weights.shape[1], *leaf.shape[1:])
    for number, weight in enumerate(weights.unbind(1)):
        last = number == weights.shape[1] - 1
        (one,) = torch.autograd.grad(scores, leaf, weight, retain_graph=not last, allow_unused=True)
        if one is None:
            raise no_gradient(oracle.model, len(leaf))
        found[:, number] = one
    return found


def _graph(oracle: Asked, x: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        answer = oracle._checked(oracle._differentiated(leaf, draws), len(x))
    if not answer.requires_grad:
        raise no_gradient(oracle.model, len(x))
    return leaf, answer


def _gradient(oracle: Asked, answer: Tensor, leaf: Tensor, grad_output: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(answer, leaf, grad_output, allow_unused=True)
    if gradient is None:
        raise no_gradient(oracle.model, len(leaf))
    return gradient


def no_gradient(model: nn.Module, images: int) -> ValueError:
    """The error for a model whose answers do not depend differentiably on its images."""
    return ValueError(
        f"{type(model).__name__} gives answers without a gradient with respect to the {images} images: it "
        "detaches or rounds them, or runs under no_grad; give it a surrogate, or attack it as a black box"
    )
