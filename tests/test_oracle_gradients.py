"""QueryOracle: gradients through surrogates, in chunks, and where memory runs out."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Noisy, Small, images
from torch import Tensor, nn

from lit_adv.defense import Defense, straight_through
from lit_adv.oracle import QueryOracle


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Memory(nn.Module):
    """Runs out of memory beyond ``limit`` images in a forward, or only where a graph is kept."""

    def __init__(self, limit: int, graph_only: bool = False) -> None:
        super().__init__()
        self.inner, self.limit, self.graph_only = Small(), limit, graph_only
        self.failures = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.limit and (torch.is_grad_enabled() or not self.graph_only):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x)


# gradients


class Rounded(Defense):
    """Coarse pixels, with a gradient through the identity and one of another kind."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * 4).round() / 4)

    def surrogate(self, x: Tensor, **_: object) -> Tensor:
        return self.inner(straight_through((x * 4).round() / 4, x))

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * self.surrogate(x)


def gradient_through(oracle: QueryOracle, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    answer = oracle.scores(leaf, torch.arange(len(x)))
    weights = torch.linspace(-1, 1, answer.numel(), dtype=answer.dtype).view_as(answer)
    return answer.detach(), torch.autograd.grad((answer * weights).sum(), leaf)[0]


def test_gradients_go_through_the_models_surrogate() -> None:
    x, model = images(3), Rounded()
    answer, gradient = gradient_through(QueryOracle(model, 3), x)
    torch.testing.assert_close(answer, model(x))
    assert gradient.flatten(1).norm(dim=1).min() > 1e-3
    assert not QueryOracle(model, 3).doubtful


@pytest.mark.parametrize("named", [True, False])
def test_a_surrogate_brought_along_is_used_and_doubted(named: bool) -> None:
    x, model = images(3), Rounded()
    oracle = QueryOracle(model, 3, surrogate="doubled" if named else model.doubled)
    answer, gradient = gradient_through(oracle, x)
    plain, plain_gradient = gradient_through(QueryOracle(model, 3), x)
    torch.testing.assert_close(answer, 2 * plain)
    torch.testing.assert_close(gradient, 2 * plain_gradient)
    assert oracle.doubtful
    torch.testing.assert_close(oracle.scores(x, torch.arange(3)), plain)  # without grad: as deployed


@pytest.mark.parametrize("weights", [True, False])
def test_answer_without_gradient(weights: bool) -> None:
    """A hard threshold, before or after layers with weights."""

    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x > 0.5).double()) if weights else self.inner(x).detach()

    with pytest.raises(ValueError, match=r"gradient.*surrogate"):
        gradient_through(QueryOracle(Hard(), 3), images(3))


def test_no_graph_is_kept_without_gradients() -> None:
    assert not QueryOracle(Small(), 2).scores(images(2), rows(0, 1)).requires_grad


def test_parameters_gather_no_gradient() -> None:
    model = Small()
    gradient_through(QueryOracle(model, 5, chunk=2), images(5))
    assert all(parameter.grad is None for parameter in model.parameters())


# chunks and memory


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000, None])
@pytest.mark.parametrize("stochastic", [False, True])
def test_chunks_change_nothing(chunk: int | None, stochastic: bool) -> None:
    def model() -> nn.Module:
        return Noisy(Small(), 4) if stochastic else Small()

    x = images(7)
    plain = QueryOracle(model(), 7, chunk=7, index=torch.arange(50, 57))
    other = QueryOracle(model(), 7, chunk=chunk, index=torch.arange(50, 57))
    for _ in range(2):
        for ours, theirs in zip(gradient_through(other, x), gradient_through(plain, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.scores(x, torch.arange(7)), plain.scores(x, torch.arange(7)))
    assert torch.equal(other.queries, plain.queries)


def test_chunks_are_not_exceeded() -> None:
    x = images(7)
    model = Counting(Small(), x)
    gradient_through(QueryOracle(model, 7, chunk=3), x)
    assert model.largest == 3


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("chunk", [7, 64, None])
def test_running_out_of_memory_halves_the_chunk(limit: int, gradient: bool, chunk: int | None) -> None:
    x, model = images(7), Memory(limit)
    oracle = QueryOracle(model, 7, chunk=chunk)
    if gradient:
        answer, slope = gradient_through(oracle, x)
        torch.testing.assert_close(slope, gradient_through(QueryOracle(Small(), 7), x)[1], rtol=1e-12, atol=1e-12)
    else:
        answer = oracle.scores(x, torch.arange(7))
    torch.testing.assert_close(answer, decided_scores(x), rtol=1e-12, atol=1e-12)
    assert model.failures > 0
    assert 1 <= oracle.chunk <= max(limit, 3)
    assert oracle.queries.tolist() == [1] * 7
    failures = model.failures
    oracle.label(x, torch.arange(7))
    assert model.failures == failures  # the lesson is remembered


def decided_scores(x: Tensor) -> Tensor:
    with torch.no_grad():
        return Small()(x)


def test_running_out_of_memory_in_the_graph_only() -> None:
    x, model = images(7), Memory(2, graph_only=True)
    oracle = QueryOracle(model, 7, chunk=64)
    _, slope = gradient_through(oracle, x)
    torch.testing.assert_close(slope, gradient_through(QueryOracle(Small(), 7), x)[1], rtol=1e-12, atol=1e-12)
    assert oracle.chunk == 2


def test_running_out_of_memory_with_a_random_model_draws_the_same() -> None:
    x = images(7)
    oracle = QueryOracle(Noisy(Memory(2), 4), 7, chunk=7)
    plain = QueryOracle(Noisy(Small(), 4), 7, chunk=7)
    for ours, theirs in zip(gradient_through(oracle, x), gradient_through(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_memory_that_does_not_hold_one_image() -> None:
    for gradient in (False, True):
        oracle, x = QueryOracle(Memory(0), 3), images(3).requires_grad_(gradient)
        with pytest.raises(torch.OutOfMemoryError, match="single image"):
            oracle.scores(x, torch.arange(3))


def test_running_out_of_memory_in_the_backward_pass() -> None:
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            if len(grad) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Small()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(Greedy.apply(x))

    x = images(7)
    _, slope = gradient_through(QueryOracle(Model(), 7), x)
    torch.testing.assert_close(slope, gradient_through(QueryOracle(Small(), 7), x)[1], rtol=1e-12, atol=1e-12)


def test_no_images() -> None:
    oracle = QueryOracle(Small(), 3)
    assert oracle.scores(images(0), rows()).shape == (0, 4)
    assert oracle.label(images(0), rows()).shape == (0,)
    assert oracle.confirm(images(0), rows()).shape == (0,)
    assert oracle.queries.tolist() == [0, 0, 0]


def test_rows_taken_up_at_a_larger_chunk_are_not_asked_twice() -> None:
    class Watching(Small):
        forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).forwards += len(x)
            return super().forward(x)

    model, x = Watching(), images(6)
    oracle = QueryOracle(model, 6)
    for number, size in enumerate((64, 2)):
        oracle.chunk_tuner.size = size
        leaf = x.clone().requires_grad_()
        oracle.scores(leaf, torch.arange(6)).sum().backward()
        assert model.forwards == 6 * (number + 1)
    oracle.chunk_tuner.halve()
    oracle.scores(x.clone().requires_grad_(), torch.arange(6)).sum().backward()
    assert model.forwards == 6 * 4
