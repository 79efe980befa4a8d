"""Whether an evaluation can be believed: checks over attacks' records and over the model, each with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lit_adv.tables import p_value, threat


@dataclass(frozen=True)
class Thresholds:
    """Where a check warns; fixed before the first audit was run.

    Shares are of the images that a check looks at.

    Attributes:
        unique: broken by black-box attacks alone, beside white-box ones under the same threat: more is a warning, and
            so is any black-box attack that breaks more than the best white-box one.
        single_step: broken by one step beyond those broken by many steps.
        growth: lost when the radius grows.
        everything: broken at eps 0.5 (linf), and by white-box attacks without a radius: fewer is a warning.
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

Status = Literal["PASS", "WARN", "SKIP"]
_WEIGHT = ("WARN", "PASS", "SKIP")


class Check(NamedTuple):
    """A check in words: what is looked at, what a warning means, what to run next."""

    title: str
    means: str
    next: str


CHECKS: Mapping[str, Check] = {
    "black_box": Check(
        "black box against white box",
        "gradients may be masked, or the white-box attacks too weak: who sees gradients should do at least as well",
        "attack through a useful gradient (surrogate: METHOD in the attack's configuration, or lit_adv.defense."
        "straight_through in the defence), with more steps and restarts, and keep the black-box attack in the report",
    ),
    "single_step": Check(
        "one step against many",
        "gradients mislead beyond the nearest surroundings: many steps should do at least as well as one",
        "smaller and more steps (PGD: steps 200, restarts 10), and the margin as loss (configs/attack/"
        "pgd_margin_linf.yaml)",
    ),
    "growth": Check(
        "success grows with the radius",
        "what a smaller radius allows a larger one allows too: the attack loses its way",
        "more steps with a smaller step_size, restarts, and a black-box attack (configs/attack/square_linf.yaml) at "
        "each radius",
    ),
    "everything": Check(
        "linf 0.5 breaks everything",
        "at 0.5 every image can be made plain grey: an attack that fails there, or without any limit, fails for "
        "want of a useful gradient",
        "the defence's surrogate, then black-box attacks (configs/attack/square_linf.yaml, hop_skip_jump_linf.yaml) at "
        "eps 0.5",
    ),
    "blind": Check(
        "input gradients",
        "where the gradient is 0 or not finite a white-box attack stands still or walks at random",
        "a surrogate (lit_adv.defense.straight_through; surrogate: METHOD in the attack's configuration), or black-box "
        "attacks",
    ),
    "gain": Check(
        "more steps and restarts",
        "the attacks have not converged: robust accuracy is lower than it seems",
        "more of both until nothing is gained (--trainer.callbacks.attack.steps=200, --trainer.callbacks.attack."
        "restarts=10), or configs/attack/standard_linf.yaml",
    ),
    "repeats": Check(
        "the same answer twice",
        "the model is random, or depends on the batch, and does not say so: attacks do not average over it",
        "mend it (dropout or batch statistics left on), or make it a lit_adv.defense.Defense with stochastic = True",
    ),
    "surrogate": Check(
        "the surrogate's values",
        "white-box attacks climb another function than the one that is deployed",
        "lit_adv.defense.straight_through(exact, smooth): the deployed value with the smooth gradient",
    ),
    "above_clean": Check(
        "robust against clean accuracy",
        "no attack makes a model better: the attacks saw other images, or the model answers at random",
        "evaluate all attacks in one run on the same images, a random model with draws: 30 or more",
    ),
    "unverified": Check(
        "claims that hold",
        "the attack was shown another model than the one deployed, or chance: what fails verification is no success",
        "for a random model a larger confirm; else full precision (precision: fp32), and look whether the model's "
        "answers depend on the batch",
    ),
    "noise": Check(
        "random noise against the gradient",
        "a direction that knows nothing does better than the gradient: the gradient is masked or wrong",
        "a surrogate, black-box attacks, and python -m lit_adv.experiments.masking for what masked gradients look like",
    ),
    "null": Check(
        "no perturbation at all",
        "asked often enough the model errs on clean images by chance: success at first hit says nothing",
        "believe verified successes alone; raise confirm and draws (confirm: 101, draws: 100)",
    ),
    "slope": Check(
        "values follow the gradient",
        "the gradient is scaled, masked or wrong: attacks by its sign may not notice, those by its size fail",
        "the backward pass of the defence; losses free of scale (configs/attack/pgd_margin_linf.yaml); a surrogate",
    ),
}
"""All checks, in the order in which they are reported."""

NOT_PROBED = "not probed: evaluate.py does so unless told --audit=false, lit_adv.evaluate with audit=64"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: one of :data:`CHECKS`.
        status: PASS, WARN, or SKIP where there was nothing to look at.
        said: the figures in words, or why there are none.
        n: images looked at.
        p: McNemar's p, where two attacks are compared on the same images.
        figures: the numbers by name; shares in [0, 1].
    """

    check: str
    status: Status
    said: str
    n: int | None = None
    p: float | None = None
    figures: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {self.check!r}")

    @property
    def title(self) -> str:
        """What is looked at."""
        return CHECKS[self.check].title

    @property
    def means(self) -> str:
        """What a warning means."""
        return CHECKS[self.check].means

    @property
    def next(self) -> str:
        """What to run next after a warning."""
        return CHECKS[self.check].next

    def __str__(self) -> str:
        beside = [] if self.n is None else [f"n {self.n:,}"]
        beside += [] if self.p is None else [f"McNemar's p {p_value(self.p)}"]
        text = f"{self.title}: {self.said}" + (f" ({', '.join(beside)})" if beside else "")
        return f"{text}. {self.means[:1].upper()}{self.means[1:]}. Next: {self.next}" if self.status == "WARN" else text

    def as_dict(self) -> dict[str, Any]:
        """The finding ready for JSON."""
        own = {name: getattr(self, name) for name in ("check", "title", "status", "said", "n", "p")}
        return {**own, "figures": dict(self.figures), "means": self.means, "next": self.next}


def judged(
    check: str, warn: bool, said: str, n: int, figures: Mapping[str, float | None], p: float | None = None
) -> Finding:
    """A finding that warns or passes."""
    return Finding(check, "WARN" if warn else "PASS", said, n, p, dict(figures))


def skipped(check: str, reason: str) -> Finding:
    """A check that had nothing to look at."""
    return Finding(check, "SKIP", reason)


@dataclass(frozen=True)
class Audited:
    """The findings about one model under one threat model.

    Attributes:
        model: its name; None: the report's own. norm, eps: of the threat model. findings: one per check at most.
    """

    model: str | None
    norm: str
    eps: float
    findings: tuple[Finding, ...]

    @property
    def setting(self) -> str:
        """Model and threat model."""
        return f"{self.model}, {threat(self.norm, self.eps)}"

    @property
    def counts(self) -> str:
        """How many checks passed, warned and were skipped."""
        found = [finding.status for finding in self.findings]
        return ", ".join(f"{found.count(status)} {status}" for status in ("PASS", "WARN", "SKIP"))

    @property
    def warnings(self) -> list[str]:
        """The checks that warn, in words."""
        return [f"{self.setting}: {finding}" for finding in self.findings if finding.status == "WARN"]

    @property
    def lines(self) -> list[str]:
        """All that did not warn in words, then the number of each; what was skipped for one reason stands together."""
        told = [f"PASS {self.setting}: {finding}" for finding in self.findings if finding.status == "PASS"]
        skips: dict[str, list[str]] = {}
        for finding in self.findings:
            if finding.status == "SKIP":
                skips.setdefault(finding.said, []).append(finding.title)
        told += [f"SKIP {self.setting}: {', '.join(titles)}: {reason}" for reason, titles in skips.items()]
        return [*told, self.summary]

    @property
    def summary(self) -> str:
        """The number of each, in a line."""
        return f"audit: {self.counts} ({self.setting})"


def complete(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Every check once, in order: its gravest finding, of equal ones the first; what was not looked at is skipped."""
    by_weight = sorted(findings, key=lambda finding: _WEIGHT.index(finding.status))
    found = {finding.check: finding for finding in reversed(by_weight)}
    return tuple(found.get(check) or skipped(check, NOT_PROBED) for check in CHECKS)
