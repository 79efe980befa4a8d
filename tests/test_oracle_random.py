"""QueryOracle: fresh, keyed answers of random models, and stand-ins."""

from __future__ import annotations

import pytest
import torch
from contracts.nets import Counting, Linear, Noisy, Small, decided, images
from torch import Tensor, nn

from lit_adv.draws import Draws
from lit_adv.oracle import Access, QueryOracle


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


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


@pytest.mark.parametrize("output", ["probs", "labels"])
def test_a_random_model_answers_logits(output: str) -> None:
    """Defences do, and averages are taken of them: anything else would be averaged wrongly and silently."""
    with pytest.raises(ValueError, match="output"):
        QueryOracle(Noisy(Small(), 4), 1, output=output, answers=3)  # type: ignore[arg-type]


def test_randomness_without_averages_is_refused_by_name() -> None:
    class Odd(nn.Module):
        stochastic = True

        def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
            return torch.zeros(len(x), 3)

    with pytest.raises((ValueError, TypeError), match="Defense"):
        QueryOracle(Odd(), 1, answers=3)


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
