"""QueryOracle: the ledger against an independent count, access, outputs, memory, random models."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.nets import Counting, Linear, Noisy, Small, decided, images
from torch import Tensor, nn

from lit_adv.defense import Defense, straight_through
from lit_adv.draws import Draws
from lit_adv.oracle import Access, AccessDenied, QueryBudgetExceeded, QueryOracle


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Answering(nn.Module):
    """Answers by a function of the classifier's logits."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.inner, self.function = Small(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))  # type: ignore[operator]


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


# the ledger


def test_ledger_counts_every_image_of_every_row() -> None:
    x = images(4)
    model = Counting(Small(), x)
    oracle = QueryOracle(model, 4, chunk=3)
    many = x[:, None].repeat(1, 5, 1, 1, 1)
    oracle.scores(x, rows(0, 1, 2, 3))
    oracle.scores(many[[3, 1]], rows(3, 1))
    oracle.label(many[:1, :2], rows(0))
    oracle.label(x[[2, 2, 0]], rows(2, 2, 0))
    assert oracle.queries.tolist() == [4, 6, 3, 6]
    assert torch.equal(oracle.queries, model.seen)


def test_ledger_of_gradients() -> None:
    x = images(4)
    model = Counting(Small(), x)
    oracle = QueryOracle(model, 4, chunk=64)
    leaf = x[:2, None].repeat(1, 3, 1, 1, 1).requires_grad_()
    oracle.scores(leaf, rows(0, 1)).sum().backward()
    assert oracle.queries.tolist() == [3, 3, 0, 0]
    assert torch.equal(oracle.queries, model.seen)


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("stochastic", [False, True])
def test_ledger_with_several_answers(answers: int, stochastic: bool) -> None:
    x = images(3)
    model: nn.Module = Counting(Small(), x)
    counter = model
    if stochastic:
        model = Noisy(model, 4, 1e-3)
    oracle = QueryOracle(model, 3, answers=answers, chunk=2)
    oracle.scores(x, rows(0, 1, 2))
    oracle.label(x[1:], rows(1, 2))
    each = answers if stochastic else 1
    assert oracle.queries.tolist() == [each, 2 * each, 2 * each]
    assert torch.equal(oracle.queries, counter.seen)  # type: ignore[arg-type]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("confirm", [None, 1, 5])
def test_ledger_of_confirmations(stochastic: bool, confirm: int | None) -> None:
    x = images(3)
    counter = Counting(Small(), x)
    model = Noisy(counter, 4, 1e-3) if stochastic else counter
    oracle = QueryOracle(model, 3, confirm=confirm, surrogate=None if stochastic else Small())
    labels = oracle.confirm(x[1:], rows(1, 2))
    assert torch.equal(labels, decided(Small(), x[1:]))
    expected = {None: 31, 1: 1, 5: 5}[confirm] if stochastic else 1
    assert oracle.queries.tolist() == [0, expected, expected]
    assert torch.equal(oracle.queries, counter.seen)


@pytest.mark.parametrize("budget", [0, 1, 37, 200])
def test_a_budget_is_spent_to_the_last_and_never_exceeded(budget: int) -> None:
    x = images(2)
    model = Counting(Small(), x)
    oracle = QueryOracle(model, 2, budget=budget)
    for _ in range(budget):
        oracle.scores(x[:1], rows(0))
    assert oracle.remaining(rows(0, 1)).tolist() == [0, budget]
    with pytest.raises(QueryBudgetExceeded, match=f"budget of {budget}"):
        oracle.scores(x, rows(0, 1))
    with pytest.raises(QueryBudgetExceeded):
        oracle.label(x[1:2, None].repeat(1, budget + 1, 1, 1, 1), rows(1))
    assert oracle.queries.tolist() == model.seen.tolist() == [budget, 0]  # nothing was asked or booked


def test_rows_that_repeat_are_charged_for_each() -> None:
    oracle = QueryOracle(Small(), 2, budget=3)
    with pytest.raises(QueryBudgetExceeded):
        oracle.label(images(4), rows(0, 0, 0, 0))
    oracle.label(images(4), rows(0, 0, 0, 1))
    assert oracle.queries.tolist() == [3, 1]


def test_remaining_counts_answers_of_a_random_model() -> None:
    oracle = QueryOracle(Noisy(Small(), 4), 1, budget=10, answers=3)
    assert oracle.remaining(rows(0)).tolist() == [3]
    oracle.scores(images(1), rows(0))
    assert oracle.remaining(rows(0)).tolist() == [2]


def test_without_a_budget_there_is_no_end() -> None:
    oracle = QueryOracle(Small(), 1)
    oracle.scores(images(1), rows(0))
    assert int(oracle.remaining(rows(0))) > 2**60


def test_a_confirmation_that_cannot_be_paid_is_none() -> None:
    x = images(3)
    counter = Counting(Small(), x)
    oracle = QueryOracle(Noisy(counter, 4, 1e-3), 3, budget=5, confirm=4)
    oracle.scores(x[:1, None].repeat(1, 2, 1, 1, 1), rows(0))
    labels = oracle.confirm(x, rows(0, 1, 2))
    assert labels[0] == -1
    assert (labels[1:] >= 0).all()
    assert oracle.queries.tolist() == counter.seen.tolist() == [2, 4, 4]


# access and outputs


@pytest.mark.parametrize("access", list(Access))
def test_no_more_is_told_than_was_granted(access: Access) -> None:
    x = images(2)
    model = Counting(Small(), x)
    oracle = QueryOracle(model, 2, access)
    oracle.label(x, rows(0, 1))
    for needed, image in ((Access.PROBS, x), (Access.GRADIENT, x.clone().requires_grad_())):
        if access < needed:
            with pytest.raises(AccessDenied, match=f"needs {needed.name} access and was granted {access.name}"):
                oracle.scores(image, rows(0, 1))
        else:
            oracle.scores(image, rows(0, 1))
    assert torch.equal(oracle.queries, model.seen)


def test_probabilities_only_means_log_probabilities() -> None:
    x = images(5)
    logits = Small()(x)
    assert torch.equal(QueryOracle(Small(), 5, Access.LOGITS).scores(x, torch.arange(5)), logits)
    torch.testing.assert_close(
        QueryOracle(Small(), 5, Access.PROBS).scores(x, torch.arange(5)), logits.log_softmax(-1)
    )


@pytest.mark.parametrize("output", ["log_probs", "probs"])
@pytest.mark.parametrize("access", [Access.PROBS, Access.GRADIENT])
def test_outputs_other_than_logits(output: str, access: Access) -> None:
    function = {"log_probs": lambda z: z.log_softmax(-1), "probs": lambda z: z.softmax(-1)}[output]
    x = images(5).requires_grad_(access == Access.GRADIENT)
    oracle = QueryOracle(Answering(function), 5, access, output=output)  # type: ignore[arg-type]
    expected = Small()(x).log_softmax(-1)
    answer = oracle.scores(x, torch.arange(5))
    torch.testing.assert_close(answer, expected)
    assert torch.equal(oracle.label(x.detach(), torch.arange(5)), expected.argmax(-1))
    if access == Access.GRADIENT:
        weights = torch.randn_like(expected)
        (ours,) = torch.autograd.grad((answer * weights).sum(), x)
        (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
        torch.testing.assert_close(ours, theirs)


def test_probabilities_have_a_floor() -> None:
    model = Answering(lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), 2))
    oracle = QueryOracle(model, 1, output="probs", floor=1e-20)
    torch.testing.assert_close(oracle.scores(images(1), rows(0)), torch.tensor([[0.0, math.log(1e-20)]]))


def test_a_model_of_labels_has_labels_only() -> None:
    model = Answering(lambda z: z.argmax(-1))
    oracle = QueryOracle(model, 3, output="labels")
    x = images(3)
    assert torch.equal(oracle.label(x, torch.arange(3)), decided(Small(), x))
    many = x[:, None].repeat(1, 2, 1, 1, 1)
    assert torch.equal(oracle.label(many, torch.arange(3)), decided(Small(), x)[:, None].repeat(1, 2))
    with pytest.raises(AccessDenied, match="labels only"):
        oracle.scores(x, torch.arange(3))


def test_logits_where_labels_were_promised_are_named() -> None:
    with pytest.raises(ValueError, match="label"):
        QueryOracle(Small(), 2, output="labels").label(images(2), rows(0, 1))


@pytest.mark.parametrize("gradient", [False, True])
def test_probabilities_instead_of_logits_are_detected(gradient: bool) -> None:
    oracle = QueryOracle(Answering(lambda z: z.softmax(-1)), 5)
    with pytest.raises(ValueError, match="returns probabilities"):
        oracle.scores(images(5).requires_grad_(gradient), torch.arange(5))


@pytest.mark.parametrize("gradient", [False, True])
def test_weights_that_hold_nan_are_named(gradient: bool) -> None:
    model = Small()
    model.first.data[3, 4] = math.nan
    with pytest.raises(ValueError, match="first"):
        QueryOracle(model, 2).scores(images(2).requires_grad_(gradient), rows(0, 1))


def test_nan_is_no_label() -> None:
    model = Answering(lambda z: z)
    x = images(4)
    oracle = QueryOracle(model, 4, surrogate=Small())
    oracle.label(x, torch.arange(4))  # the first answer is sound
    model.function = lambda z: torch.where(torch.arange(len(z))[:, None] == 1, math.nan, z)
    assert (oracle.label(x, torch.arange(4)) < 0).tolist() == [False, True, False, False]
    assert (oracle.confirm(x, torch.arange(4)) < 0).tolist() == [False, True, False, False]
    assert int(oracle.nonfinite) == 2
    oracle.scores(x, torch.arange(4))
    assert int(oracle.nonfinite) == 3


def test_half_precision_answers_become_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        oracle = QueryOracle(Answering(lambda z, dtype=dtype: z.to(dtype)), 2)
        assert oracle.scores(images(2), rows(0, 1)).dtype == torch.float32


def test_images_of_wrong_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(n, C, H, W\) or \(n, s, C, H, W\)"):
        QueryOracle(Small(), 1).label(images(1)[0], rows(0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"budget": -1}, "budget"),
        ({"answers": 0}, "answers"),
        ({"confirm": 0}, "confirm"),
        ({"floor": 0.0}, "floor"),
        ({"output": "softmax"}, "output"),
        ({"chunk": 0}, "chunk"),
        ({"surrogate": "nothing"}, "surrogate"),
        ({"access": 7}, "Access"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        QueryOracle(Small(), 1, **arguments)  # type: ignore[arg-type]


def test_device_of_a_model_without_parameters() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(3, device="meta"))

    assert QueryOracle(Buffered(), 1).device.type == "meta"
    assert QueryOracle(nn.Flatten(), 1).device.type == "cpu"


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

    with pytest.raises(ValueError, match="gradient.*surrogate"):
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
        with pytest.raises(torch.OutOfMemoryError, match="single image"):
            answer = QueryOracle(Memory(0), 3).scores(images(3).requires_grad_(gradient), torch.arange(3))
            answer.sum().backward()


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


# random models


def test_every_query_of_a_random_model_draws_afresh() -> None:
    model = Noisy(Small(), 4)
    oracle = QueryOracle(model, 2, answers=2, confirm=3)
    x = images(2)
    many = x[:, None].repeat(1, 3, 1, 1, 1)
    oracle.scores(x, rows(0, 1))
    oracle.scores(many, rows(0, 1))
    oracle.label(many, rows(0, 1))
    oracle.confirm(x, rows(0, 1))
    seen = torch.cat(model.seen)
    assert len(seen) == 2 * (2 + 6 + 6 + 3)
    assert len(seen.unique()) == len(seen)
    assert torch.equal(oracle.queries, rows(17, 17))


@pytest.mark.parametrize(("answers", "eot"), [(1, 4), (2, 4), (3, 3)])
def test_gradients_of_a_random_model_draw_afresh(answers: int, eot: int) -> None:
    model = Noisy(Small(), 4)
    oracle = QueryOracle(model, 1, answers=answers)
    for _ in range(4):
        oracle.scores(images(1)[:, None].repeat(1, eot, 1, 1, 1).requires_grad_(), rows(0))
    seen = torch.cat(model.seen)
    assert len(seen) == 4 * eot
    assert len(seen.unique()) == len(seen)


def test_randomness_is_keyed_by_index_and_query_not_by_batch() -> None:
    x, index = images(5), torch.tensor([40, 3, 11, 8, 90])
    whole = QueryOracle(Noisy(Small(), 4), 5, index=index, answers=2)
    first, second = whole.scores(x, torch.arange(5)), whole.scores(x, torch.arange(5))
    assert not torch.equal(first, second)
    for i in range(5):
        alone = QueryOracle(Noisy(Small(), 4), 1, index=index[i : i + 1], answers=2)
        for expected in (first, second):
            torch.testing.assert_close(alone.scores(x[i : i + 1], rows(0))[0], expected[i], rtol=1e-12, atol=1e-12)
    other = QueryOracle(Noisy(Small(), 4), 5, index=index, answers=2, seed=1)
    assert not torch.equal(other.scores(x, torch.arange(5)), first)


def test_answers_are_averaged_and_labels_voted() -> None:
    x, model = images(6), Noisy(Small(), 4, 3.0)
    oracle = QueryOracle(model, 6, Access.PROBS, answers=5)
    averaged = oracle.scores(x, torch.arange(6))
    start = Draws(0, torch.arange(6), torch.zeros(6, dtype=torch.int64), key=-1)
    single = torch.stack([model(x, start.later(number)) for number in range(5)])
    torch.testing.assert_close(averaged.exp(), single.softmax(-1).mean(0), rtol=1e-5, atol=1e-6)
    votes = QueryOracle(model, 6, answers=5).label(x, torch.arange(6))
    for i in range(6):
        counts = single.argmax(-1)[:, i].bincount(minlength=4)
        assert counts[votes[i]] == counts.max()


# modes and stand-ins


def test_fast_answers_the_search_and_the_model_confirms() -> None:
    x = images(3)
    slow, fast = Counting(Small(), x), Counting(Small(scale=1.0), x)
    oracle = QueryOracle(slow, 3, fast=fast)
    torch.testing.assert_close(oracle.scores(x, torch.arange(3)), fast.model(x))
    oracle.label(x, torch.arange(3))
    assert (slow.seen.tolist(), fast.seen.tolist()) == ([0] * 3, [2] * 3)
    assert torch.equal(oracle.confirm(x, torch.arange(3)), decided(Small(), x))
    assert (slow.seen.tolist(), oracle.queries.tolist()) == ([1] * 3, [3] * 3)
    assert oracle.doubtful


def test_linear_gradient_is_the_weight() -> None:
    model, x = Linear(3), images(2)
    leaf = x.clone().requires_grad_()
    QueryOracle(model, 2).scores(leaf, rows(0, 1))[:, 1].sum().backward()
    torch.testing.assert_close(leaf.grad, model.weight[1].detach().view(1, 3, 8, 8).expand(2, -1, -1, -1))
