"""Chunk: how the number of images per forward is found."""

from __future__ import annotations

import pytest
import torch

from lit_adv.chunk import Chunk

CPU = torch.device("cpu")


def run(rate: dict[int, float], chunk: Chunk, forwards: int = 100) -> Chunk:
    """Full forwards at ``rate[size]`` images per second."""
    for _ in range(forwards):
        chunk.observe(chunk.size, chunk.size / rate[chunk.size])
    return chunk


def test_a_given_size_stays() -> None:
    chunk = run({7: 1e9}, Chunk(7, CPU))
    assert (chunk.size, chunk.settled) == (7, True)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk must be at least 1 .* got {size}"):
        Chunk(size, CPU)


def test_doubles_while_it_pays_and_goes_back_when_it_does_not() -> None:
    chunk = run({64: 1e3, 128: 1.5e3, 256: 2e3, 512: 1.5e3}, Chunk(None, CPU))
    assert (chunk.size, chunk.settled) == (256, True)


def test_short_forwards_double_at_the_same_rate_to_share_the_work_around_them() -> None:
    assert run(dict.fromkeys((64, 128, 256, 512, 1024), 5e4), Chunk(None, CPU)).size == 1024


def test_stays_where_doubling_made_no_difference() -> None:
    chunk = run({64: 1e3, 128: 1.5e3, 256: 1.5e3}, Chunk(None, CPU))
    assert (chunk.size, chunk.settled) == (256, True)


def test_nearly_full_forwards_count() -> None:
    chunk = Chunk(None, CPU)
    for _ in range(4):
        chunk.observe(60, 1e-3)
    assert chunk.size == 128


def test_stops_at_the_limit() -> None:
    chunk = run({size: size * 1e4 for size in (64, 128, 256, 512, 1024, 2048)}, Chunk(None, CPU))
    assert (chunk.size, chunk.settled) == (1024, True)


def test_stops_where_a_forward_takes_long() -> None:
    chunk = run({64: 100.0, 128: 1000.0}, Chunk(None, CPU))
    assert (chunk.size, chunk.settled) == (64, True)


def test_partial_forwards_and_the_warm_up_teach_nothing() -> None:
    chunk = Chunk(None, CPU)
    for _ in range(50):
        chunk.observe(chunk.size // 2, 1e-9)
    assert (chunk.size, chunk.settled) == (64, False)
    chunk.observe(64, 1e9)  # the first at a size may be slow
    for _ in range(3):
        chunk.observe(64, 1e-3)
    assert chunk.size == 128


def test_halving_down_to_one_image() -> None:
    chunk = Chunk(5, CPU)
    for expected in (2, 1):
        chunk.halve()
        assert (chunk.size, chunk.settled) == (expected, True)
    with pytest.raises(torch.OutOfMemoryError, match="single image"):
        chunk.halve()


def test_forwards_with_a_backward_count_from_the_first_of_them_on() -> None:
    chunk = Chunk(None, torch.device("cpu"))
    for _ in range(40):
        chunk.observe(chunk.size, 1e-3 * chunk.size)  # no gain by more: settled
    assert chunk.settled
    chunk.observe(chunk.size, 0.1, backward=True)
    assert (chunk.size, chunk.settled) == (64, False)
    for _ in range(3):
        chunk.observe(64, 0.1, backward=True)
    before = chunk.size
    assert before == 128
    for _ in range(20):
        chunk.observe(128, 1e-6)  # plain forwards tell nothing now
    assert (chunk.size, chunk.settled) == (128, False)


def test_a_given_or_halved_size_stays() -> None:
    given, fallen = Chunk(8, torch.device("cpu")), Chunk(None, torch.device("cpu"))
    fallen.halve()
    for chunk in (given, fallen):
        size = chunk.size
        for _ in range(6):
            chunk.observe(size, 1e-3, backward=True)
        assert (chunk.size, chunk.settled) == (size, True)
