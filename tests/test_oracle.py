"""QueryOracle: the ledger against an independent count, access and outputs."""

from __future__ import annotations

import math

import pytest
import torch
from contracts.nets import Counting, Noisy, Small, decided, images
from torch import Tensor, nn

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
    torch.testing.assert_close(QueryOracle(Small(), 5, Access.PROBS).scores(x, torch.arange(5)), logits.log_softmax(-1))


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
