"""Estimates on balls of known dimension, by hand and by a plain loop, and images among their own neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from detectors.layered import Pixels, pairs, training
from torch import Tensor

from lit_adv.detectors.local_intrinsic_dimension import LARGEST, LocalIntrinsicDimension, intrinsic_dimension


def fitted(neighbours: tuple[int, ...] = (5, 10), references: int = 40) -> LocalIntrinsicDimension:
    detector = LocalIntrinsicDimension(Pixels(), neighbours, references, ("hidden", "pool"))
    detector.fit(training(), *pairs())
    return detector


def reference(detector: LocalIntrinsicDimension, layer: int = 0) -> Tensor:
    """Features of the clean images that a layer compares with."""
    return detector.get_buffer(f"reference_{layer}")


def test_by_hand() -> None:
    """Distances 1, 2, 4: minus the mean of log(1/4), log(2/4) and 0 is log 2."""
    found = intrinsic_dimension(torch.tensor([[4.0, 9, 1, 2]], dtype=torch.float64), [3, 2])
    torch.testing.assert_close(found, torch.tensor([[1, 2.0]], dtype=torch.float64) / math.log(2))


@pytest.mark.parametrize("dimension", [1, 2, 5, 20])
def test_uniform_balls(dimension: int, generator: torch.Generator) -> None:
    """Radii of uniform points of a ball are u^(1/d); the sum of the logs of k is a gamma variable of shape k - 1."""
    k = 200
    r = torch.rand(400, 1000, generator=generator, dtype=torch.float64) ** (1 / dimension)
    found = intrinsic_dimension(r, [k])[:, 0] * (k - 2) / k  # the mean of its inverse
    error = dimension / math.sqrt(k - 3) / math.sqrt(400)
    assert float(found.mean()) == pytest.approx(dimension, abs=5 * error)


def test_points_of_a_cube_within_a_larger_space(generator: torch.Generator) -> None:
    points = torch.zeros(20_000, 8, dtype=torch.float64)
    points[:, :3] = torch.rand(20_000, 3, generator=generator, dtype=torch.float64)
    inner = torch.zeros(50, 8, dtype=torch.float64)
    inner[:, :3] = 0.3 + 0.4 * torch.rand(50, 3, generator=generator, dtype=torch.float64)
    assert float(intrinsic_dimension(torch.cdist(inner, points), [100]).mean()) == pytest.approx(3, abs=0.25)


def test_a_plain_loop() -> None:
    detector, x = fitted(), pairs(8, 4)[1]
    found = detector.layer_scores(x, [5, 10])
    assert found.shape == (8, 2, 2)
    for n in range(8):
        for place, k in enumerate((5, 10)):
            pixels = reference(detector).tolist()
            r = sorted(math.dist(x[n].flatten().tolist(), other) for other in pixels)[:k]
            wanted = -1 / (sum(math.log(one / r[-1]) for one in r) / k)
            assert float(found[n, place, 0]) == pytest.approx(wanted, rel=1e-9)
            tops = sorted(abs(float(x[n].max()) - float(other)) for other in reference(detector, 1))[:k]
            wanted = -1 / (sum(math.log(one / tops[-1]) for one in tops) / k)
            assert float(found[n, place, 1]) == pytest.approx(wanted, rel=1e-9)


def test_the_image_itself_and_equal_distances() -> None:
    inf = LARGEST
    r = torch.tensor(
        [[0.0, 4, 1, 2, 9], [1e-9, 4, 1, 2, 9], [0, 0, 4, 1, 2], [3, 3, 3, 3, 3], [0, 0, 0, 0, 0], [0, 0, 0, 0, 2]],
        dtype=torch.float64,
    )
    found = intrinsic_dimension(r, [3])[:, 0]
    wanted = torch.tensor([1 / math.log(2)] * 3 + [inf, 0, inf], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="too few for 6 neighbours"):
        intrinsic_dimension(r, [6])


def test_a_reference_image_scores_as_if_it_were_not_there() -> None:
    detector = fitted()
    x = training().image[:3]
    inside = (reference(detector)[:, None] == x.flatten(1)).all(2).any(0)
    assert bool(inside.all())
    found = detector.layer_scores(x, [10])[:, 0, 0]
    for n in range(3):
        own = x[n].flatten()
        others = reference(detector)[(reference(detector) != own).any(1)]
        torch.testing.assert_close(found[n : n + 1], intrinsic_dimension(torch.cdist(own[None], others), [10])[0])


def test_no_image_of_a_pair_is_a_reference() -> None:
    given, (clean, x_adv) = training(), pairs(60, 0)
    assert bool((given.image[:60] == clean).all())
    detector = LocalIntrinsicDimension(Pixels(), (5,), 30, ("hidden",))
    detector.fit(given, clean, x_adv)
    torch.testing.assert_close(reference(detector), given.image[60:90].flatten(1))
    with pytest.raises(ValueError, match="more than 5 images that are in no pair, got 0"):
        LocalIntrinsicDimension(Pixels(), (5,), 30, ("hidden",)).fit(training(60), clean, x_adv)


def test_few_references_leave_out_large_neighbourhoods() -> None:
    detector = LocalIntrinsicDimension(Pixels(), layers=("hidden",))
    detector.fit(training(45, 8), *pairs())
    assert len(detector.aucs) == 4  # 10, 20, 30 and 40 of 45
    assert float(detector.chosen) in (10, 20, 30, 40)


def test_it_tells_the_pairs_apart() -> None:
    detector = fitted()
    clean, x_adv = pairs(50, 9)
    assert float((detector.score(x_adv)[:, None] > detector.score(clean)).double().mean()) > 0.9


def test_rows_are_independent_and_the_state_makes_a_round_trip() -> None:
    detector = fitted()
    x = torch.cat(pairs(10, 3))
    together = detector.score(x)
    for n in range(20):
        torch.testing.assert_close(detector.score(x[n : n + 1]), together[n : n + 1])
    other = LocalIntrinsicDimension(Pixels(), layers=("hidden", "pool"))
    other.load_state_dict(detector.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(other.score(x.clone()), together)


def test_gradients_are_finite_even_at_a_reference() -> None:
    detector = fitted()
    x = torch.cat([training().image[:2], pairs(2)[1]]).requires_grad_()
    (slope,) = torch.autograd.grad(detector.score(x).sum(), x)
    assert slope.isfinite().all()
    assert bool(slope.any())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"neighbours": ()}, "neighbours must hold"),
        ({"neighbours": (1,)}, "neighbours must hold"),
        ({"neighbours": (2.5,)}, "neighbours must hold"),
        ({"references": 10}, "references must be more than the fewest neighbours, 10"),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalIntrinsicDimension(Pixels(), **given)  # type: ignore[arg-type]
