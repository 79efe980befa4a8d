"""Whether an evaluation can be believed: checks over attacks' records and over the model, each with its figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Where a check warns; fixed before the first audit was run.

    Shares are of the images that a check looks at.

    Attributes:
        unique: broken by black-box attacks alone, beside white-box ones under the same threat: more is a warning, and
            so is any black-box attack that breaks more than the best white-box one.
        single_step: broken by one step beyond those broken by many steps.
        growth: lost when the radius grows.
        everything: broken at eps 0.5 (linf): fewer is a warning.
        blind: images whose input gradient is exactly 0 or not finite.
        slope: factor by which the model's values may rise less, or more, along the gradient than the gradient says:
            the median over images of the quotient, and of its inverse.
        gain: further broken by five times the steps, or by five restarts.
        noise: broken by random noise of the same size beyond those broken by the gradient.
        repeats: answers that differ when asked again, relative to the largest logit.
        surrogate: difference of the surrogate's value from the deployed one, relative to the largest logit.
        above_clean: robust accuracy beyond clean accuracy.
        unverified: claimed successes that fail verification, of the claimed; ``unverified_random`` of a random model.
        null: 'success' of no perturbation at all, of a random model.
    """

    unique: float = 0.01
    single_step: float = 0.0
    growth: float = 0.0
    everything: float = 0.98
    blind: float = 0.05
    slope: float = 10.0
    gain: float = 0.02
    noise: float = 0.0
    repeats: float = 1e-3
    surrogate: float = 1e-3
    above_clean: float = 0.0
    unverified: float = 0.0
    unverified_random: float = 0.05
    null: float = 0.02


THRESHOLDS = Thresholds()
