"""Values kept by place: computed once, given in the order asked for, and no more of them than fit."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_adv.kept import KeptByPlace


class Squares:
    """Squares of the places of a batch, and which rows were asked for."""

    def __init__(self, places: Tensor) -> None:
        self.places = places
        self.asked: list[list[int]] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.asked.append(self.places[rows].tolist())
        return (self.places[rows].float() ** 2)[:, None].expand(-1, 3).clone().requires_grad_()


def test_each_place_is_computed_once_and_given_in_order() -> None:
    kept = KeptByPlace()
    for places, computed in (
        ([3, 1], [[3, 1]]),
        ([1, 2, 3], [[2]]),
        ([3, 2, 1, 1], []),
        ([7], [[7]]),
        ([5, 7, 6], [[5, 6]]),
    ):
        compute = Squares(torch.tensor(places))
        found = kept(compute.places, compute)
        assert found[:, 0].tolist() == [place**2 for place in places]
        assert found.shape == (len(places), 3)
        assert not found.requires_grad
        assert compute.asked == computed


def test_what_does_not_fit_is_computed_every_time() -> None:
    kept = KeptByPlace(most=2 * 3 * 4)  # two rows of three float32
    for asked in ([[0, 1, 2]], [[2]], [[2]]):
        compute = Squares(torch.arange(3))
        assert kept(compute.places, compute)[:, 1].tolist() == [0, 1, 4]
        assert compute.asked == asked


def test_a_place_that_stands_twice_in_a_batch_is_kept_once() -> None:
    kept = KeptByPlace(most=12)
    compute = Squares(torch.tensor([4, 4]))
    assert kept(compute.places, compute)[:, 0].tolist() == [16, 16]
    mixed = Squares(torch.tensor([4, 9, 9]))
    assert kept(mixed.places, mixed)[:, 0].tolist() == [16, 81, 81]
    assert mixed.asked == [[9, 9]]


def test_what_is_kept_cannot_be_changed_from_outside() -> None:
    kept, places = KeptByPlace(), torch.arange(2)
    source = torch.ones(2, 3)
    kept(places, lambda rows: source[rows]).zero_()
    found = kept(places, lambda rows: source[rows])
    assert (found == 1).all()
    found.zero_()
    assert (kept(places, lambda rows: source[rows]) == 1).all()


def test_a_batch_of_none_has_the_shape_of_the_values() -> None:
    compute = Squares(torch.zeros(0, dtype=torch.int64))
    assert KeptByPlace()(compute.places, compute).shape == (0, 3)
