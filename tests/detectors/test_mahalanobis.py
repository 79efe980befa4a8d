"""Distances against the formula in numpy, ranks of singular covariances, and the small step by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectors.layered import Labelled, Pixels, pairs, training
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_adv.detectors.mahalanobis import Mahalanobis, class_means, whitening
from lit_adv.models import VGG


def fitted(eps: tuple[float, ...] = (0.0, 0.01), layers: tuple[str, ...] = ("hidden",)) -> Mahalanobis:
    detector = Mahalanobis(Pixels(), eps, layers)
    detector.fit(training(), *pairs())
    return detector


def gaussian(given: Labelled) -> tuple[np.ndarray, np.ndarray]:
    """Class means and the inverse of the common covariance of the pixels, in numpy."""
    h, y = given.image.flatten(1).numpy(), given.label.numpy()
    means = np.stack([h[y == c].mean(0) for c in (0, 1)])
    covariance = sum((h[n] - means[y[n]])[:, None] @ (h[n] - means[y[n]])[None] for n in range(len(h))) / len(h)
    return means, np.linalg.inv(covariance)


def test_confidence_is_that_of_the_formula() -> None:
    means, precision = gaussian(training())
    detector, x = fitted(), pairs(20, 5)[1]
    found = detector.layer_scores(x, [0.0])
    assert found.shape == (20, 1, 1)
    assert detector.ranks.tolist() == [4]
    assert detector.classes.tolist() == [0, 1]
    for n in range(20):
        away = x[n].flatten().numpy() - means
        wanted = max(-0.5 * away[c] @ precision @ away[c] for c in (0, 1))
        assert float(found[n, 0, 0]) == pytest.approx(wanted, rel=1e-9)


def test_the_small_step_goes_against_the_sign_of_the_distances_gradient() -> None:
    means, precision = gaussian(training())
    detector, x, eps = fitted(), pairs(20, 6)[1], 0.004
    found = detector.layer_scores(x, [0.0, eps])
    for n in range(20):
        h = x[n].flatten().numpy()
        squares = [(h - mean) @ precision @ (h - mean) for mean in means]
        near = means[int(np.argmin(squares))]
        moved = h - eps * np.sign(precision @ (h - near))
        wanted = max(-0.5 * (moved - mean) @ precision @ (moved - mean) for mean in means)
        assert float(found[n, 1, 0]) == pytest.approx(wanted, rel=1e-9)
        assert float(found[n, 1, 0]) > float(found[n, 0, 0])


def test_many_classes_take_little_memory(generator: torch.Generator) -> None:
    """No tensor is of images, classes and features at once."""
    detector = fitted()
    means = torch.rand(300, 200, generator=generator, dtype=torch.float64)
    matrix = torch.rand(200, 150, generator=generator, dtype=torch.float64)
    detector.means_0, detector.whitening_0 = means, matrix
    h = torch.rand(40, 200, generator=generator, dtype=torch.float64).requires_grad_()
    sizes: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = call(*args, **(kwargs or {}))
            sizes.append(found.numel() if isinstance(found, Tensor) else 0)
            return found

    with Watching():
        told = detector.confidence(0, h)
    assert max(sizes) == 300 * 200
    every = ((h[:, None] - means) @ matrix).square().sum(2)
    torch.testing.assert_close(told, -every.amin(1) / 2)
    (slope,) = torch.autograd.grad(told.sum(), h)
    (expected,) = torch.autograd.grad(-every.amin(1).sum() / 2, h)
    torch.testing.assert_close(slope, expected)


def test_a_known_gaussian(generator: torch.Generator) -> None:
    """Whitening of many samples is the inverse of the covariance they were drawn with."""
    factor = torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [-1, 3, 0.1]], dtype=torch.float64)
    h = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) @ factor.T
    w = whitening(h)
    torch.testing.assert_close(factor.T @ w @ w.T @ factor, torch.eye(3, dtype=torch.float64), atol=0.02, rtol=0)


def test_singular_covariances(generator: torch.Generator) -> None:
    h = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    h = torch.cat([h, h[:, :1] + h[:, 1:2], torch.full((50, 1), 0.3)], 1)  # one feature too many, and a constant
    h = h - h.mean(0)
    w = whitening(h)
    assert w.shape == (5, 3)
    wanted = np.linalg.pinv((h.T @ h / 50).numpy(), rcond=1e-10, hermitian=True)
    np.testing.assert_allclose((w @ w.T).numpy(), wanted, atol=1e-9)
    assert whitening(torch.zeros(4, 2, dtype=torch.float64)).shape == (2, 0)


def test_means_by_label() -> None:
    h = torch.tensor([[1.0, 2], [3, 4], [10, 20]], dtype=torch.float64)
    means = class_means(h, torch.tensor([1, 1, 0]), 2)
    torch.testing.assert_close(means, torch.tensor([[10.0, 20], [2, 3]], dtype=torch.float64))


def test_constant_features_of_all_layers_tell_nothing_but_break_nothing() -> None:
    detector = Mahalanobis(Pixels(), (0.0, 0.01), ("hidden", "pool"))
    given, (clean, x_adv) = training(), pairs()
    for images in (given.image, clean, x_adv):
        images[:, 0, 0, 1:] = 0.25
        images[:, 0, 1] = 0.25
    detector.fit(given, clean, x_adv)
    assert detector.ranks.tolist() == [1, 1]
    assert detector.score(clean).isfinite().all()


def test_a_class_without_samples() -> None:
    given = training()

    class Three(Pixels):
        num_classes = 3

    detector = Mahalanobis(Three(), (0.0,), ("hidden",))
    with pytest.warns(UserWarning, match="show 2 of 3 classes"):
        detector.fit(Labelled(given.image, given.label * 2), *pairs())
    assert detector.classes.tolist() == [0, 2]
    assert detector.means_0.shape == (2, 4)


def test_it_tells_what_lies_between_the_clusters() -> None:
    """Some six deviations off in one direction and five in another; how far the regression trusts that is its own."""
    detector = fitted()
    clean, x_adv = (detector.layer_scores(x, [0.0, 0.01]) for x in pairs(50, 9))
    assert bool((x_adv.amax(0) < clean.amin(0)).all())


def test_rows_are_independent() -> None:
    detector = fitted((0.005,), ("hidden", "pool"))
    x = torch.cat(pairs(10, 3))
    together = detector.score(x)
    assert together.shape == (20,)
    assert together.dtype == torch.float64
    order = torch.randperm(20)
    torch.testing.assert_close(detector.score(x[order]), together[order])
    for n in range(20):
        torch.testing.assert_close(detector.score(x[n : n + 1]), together[n : n + 1])
    assert detector.score(x[:0]).shape == (0,)


def test_state_round_trip_and_modes() -> None:
    detector, x = fitted(), pairs(6)[1]
    other = Mahalanobis(Pixels(), layers=("hidden",))
    other.load_state_dict(detector.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(other.score(x.clone()), detector.score(x))
    assert float(other.chosen) == float(detector.chosen)
    assert all(p.grad is None and not p.requires_grad for p in detector.parameters())


def test_the_score_has_the_gradient_of_differences() -> None:
    """With the small step, whose sign stays as it is over so small a difference."""
    detector = fitted((0.005,), ("hidden", "pool"))
    x = pairs(4, 3)[1].requires_grad_()
    (slope,) = torch.autograd.grad(detector.score(x).sum(), x)
    h = 1e-6
    for place in range(4):
        off = torch.zeros(4, dtype=torch.float64)
        off[place] = h
        with torch.no_grad():
            up, down = (detector.score(x + sign * off.view(1, 1, 2, 2)) for sign in (1, -1))
        torch.testing.assert_close(slope.flatten(1)[:, place], (up - down) / (2 * h), rtol=1e-4, atol=1e-4)


def test_a_network_with_batch_norm_in_float32() -> None:
    network = VGG(2, 1, ((4,), (6,))).eval()
    x: Tensor = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        label = network(x).argmax(1)
        network.classifier.bias.sub_(network(x).median(0).values)
        label = network(x).argmax(1)
    assert 0 < int(label.sum()) < 60
    one, two = x[label == 0][:20], x[label == 1][:20]
    detector = Mahalanobis(network)
    assert detector.layers == ("stages.0", "stages.1")
    few = min(len(one), len(two))
    detector.fit(Labelled(x, label), one[:few], two[:few])
    assert detector.score(x).isfinite().all()


@pytest.mark.parametrize("eps", [(), (-0.1,), (float("nan"),), (1.5,)])
def test_bad_sizes_are_refused(eps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="eps must hold sizes"):
        Mahalanobis(Pixels(), eps)
