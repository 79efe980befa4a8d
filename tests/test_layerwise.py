"""The regression by its stationarity, the noise by its distance, and which triples count."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from contracts.nets import images
from detectors.layered import Labelled, Pixels, keyed, pairs, training
from torch import Tensor

from lit_adv.detector import Images
from lit_adv.layerwise import Layerwise, noisy_like, regression


class FirstPixels(Layerwise):
    """Scores are the distance of the first pixel from the boundary, times the setting, and the last pixel."""

    learnt = 0

    def learn(self, training: Images, clean: Tensor) -> None:
        self.learnt = len(training.image)

    def layer_scores(self, x: Tensor, settings: Sequence[float]) -> Tensor:
        near = (x[:, 0, 0, 0] - 0.5).abs()
        columns = [torch.stack([setting * near, x[:, 0, 1, 1]], 1) for setting in settings]
        return torch.stack(columns, 1)


def test_the_regression_is_stationary_and_counts_a_constant_for_nothing(generator: torch.Generator) -> None:
    """The gradient of the penalised log-likelihood vanishes, written out by hand on standardised scores."""
    scores = torch.randn(40, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e4, 1e-3]) + 5
    scores = torch.cat([scores, torch.full((40, 1), 7.0)], 1)
    y = (scores[:, 0] + torch.randn(40, generator=generator) > 5).long()
    weights = regression(scores, y).numpy()
    assert weights[3] == 0
    s, t = scores.numpy()[:, :3], y.numpy()
    mean, spread = s.mean(0), s.std(0)
    p = 1 / (1 + np.exp(-(s @ weights[:3] + weights[4])))
    scaled = weights[:3] * spread
    gradient = scaled + ((s - mean) / spread).T @ (p - t)
    np.testing.assert_allclose(gradient, 0, atol=1e-2)
    assert abs((p - t).sum()) < 1e-2


def test_a_regression_that_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn import linear_model
    from sklearn.exceptions import ConvergenceWarning

    class Telling(linear_model.LogisticRegression):  # type: ignore[misc]
        told: type[Warning] = ConvergenceWarning

        def fit(self, *given: Any) -> Any:
            warnings.warn("so it is", self.told, stacklevel=1)
            return super().fit(*given)

    monkeypatch.setattr(linear_model, "LogisticRegression", Telling)
    scores, y = torch.randn(20, 2, dtype=torch.float64), torch.arange(20) % 2
    with pytest.raises(ValueError, match=r"does not converge \(so it is\): give more pairs"):
        regression(scores, y)
    Telling.told = FutureWarning
    with pytest.warns(FutureWarning, match="so it is"):
        regression(scores, y)


def test_noise_is_as_far_off_as_the_attack_and_in_the_box() -> None:
    clean = images(5, shape=(3, 6, 6))
    clean[0], clean[1] = 0, 1  # half of the noise is clipped away
    x_adv = (clean + torch.linspace(0, 0.3, 5)[:, None, None, None] * images(5, 1, (3, 6, 6)) - 0.1).clamp(0, 1)
    x_adv[2] = clean[2]
    noisy = noisy_like(clean, x_adv, keyed(5))
    assert bool(((noisy >= 0) & (noisy <= 1)).all())
    for n in range(5):
        assert float((noisy[n] - clean[n]).norm()) == pytest.approx(float((x_adv[n] - clean[n]).norm()), abs=1e-9)
    torch.testing.assert_close(noisy_like(clean[3:4], x_adv[3:4], keyed(1, first=3)), noisy[3:4])


def test_noise_as_far_as_clipping_allows() -> None:
    clean, x_adv = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    noisy = noisy_like(clean, x_adv, keyed(1))
    assert noisy.isfinite().all()
    assert 1 < float(noisy.norm()) < 4


def test_triples_that_count() -> None:
    """Of 60 pairs, 20 attacks that fail and one attack so far that its noise changes the decision too."""
    clean, x_adv = pairs(60)
    x_adv[:20] = clean[:20] + 1e-3
    detector = FirstPixels(Pixels(), (1.0, 2.0), ("hidden", "pool"))
    detector.fit(training(), clean, x_adv)
    assert 30 <= int(detector.triples) <= 40
    assert detector.learnt == 400
    assert float(detector.chosen) == 1.0  # the first of equally good ones
    torch.testing.assert_close(detector.aucs, torch.ones(2, dtype=torch.float64))
    far, near = detector.score(clean), detector.score(x_adv[20:])
    assert float(far.max()) < float(near.min())


def test_without_noise_the_regression_sees_clean_and_adversarial_images_alone() -> None:
    """It is that of every other pair by itself, and all pairs that the attack breaks count."""
    clean, x_adv = pairs(60)
    found = FirstPixels(Pixels(), [1.0], layers=["pool"], noisy=False)
    found.fit(training(), clean, x_adv)
    scores, truth = [], []
    for x, y in ((clean, 0), (x_adv, 1)):
        scores.append(found.layer_scores(x.double(), [1.0])[:, 0][::2])
        truth.append(torch.full((len(x[::2]),), y))
    expected = regression(torch.cat(scores), torch.cat(truth))
    torch.testing.assert_close(torch.cat([found.coefficients, found.intercept[None]]), expected, rtol=1e-4, atol=1e-4)
    assert int(found.triples) == len(clean)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no pairs", "there must be training images and pairs"),
        ("no training", "there must be training images and pairs"),
        ("nan", "NaN"),
        ("one class", "single class"),
        ("shapes", "must be pairs of images like"),
        ("labels", "one class index per image"),
        ("failures", "changes the classifier's decision"),
    ],
)
def test_what_nothing_can_be_learnt_from(what: str, message: str) -> None:
    given, (clean, x_adv) = training(40), pairs(10)
    if what == "no pairs":
        clean, x_adv = clean[:0], x_adv[:0]
    elif what == "no training":
        given = Labelled(given.image[:0], given.label[:0])
    elif what == "nan":
        x_adv[3, 0, 0, 0] = torch.nan
    elif what == "one class":
        given = Labelled(given.image, torch.zeros_like(given.label))
    elif what == "shapes":
        x_adv = x_adv[:5]
    elif what == "labels":
        given = Labelled(given.image, given.label[:7])
    else:
        x_adv = clean.clone()
    detector = FirstPixels(Pixels(), (1.0,), ("hidden", "pool"))
    with pytest.raises(ValueError, match=message):
        detector.fit(given, clean, x_adv)
    with pytest.raises(ValueError, match="has learnt nothing yet"):
        detector.score(clean)
