"""The audit's own small trials: attacks and questions that show whether the model's gradients can be believed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lit_adv import checks
from lit_adv.answers import Output, cast
from lit_adv.attack import EOT, Attack, attacking
from lit_adv.attacks import PGD, RandomNoise
from lit_adv.audit import THRESHOLDS, Audited, Finding, Thresholds, judged, skipped
from lit_adv.control import null_control
from lit_adv.datamodules import Batch
from lit_adv.losses import Loss, cross_entropy, is_adversarial, margin
from lit_adv.metrics.records import Records
from lit_adv.metrics.summary import successes, worst_case
from lit_adv.oracle import QueryOracle
from lit_adv.outcome import Outcome
from lit_adv.protocol import Protocol
from lit_adv.threat import ThreatModel
from lit_adv.trial import Trial
from lit_adv.verify import correct, fresh_labels

IMAGES = 64
"""Images that the audit looks at, unless said otherwise."""

_SEED = 0
_OF_MODEL = ("repeats", "surrogate", "blind", "everything")
_OF_THREAT = ("single_step", "growth", "gain", "noise", "slope", "null")
_LOSSES: dict[str, Loss] = {"margin": margin, "cross-entropy": cross_entropy}
_Groups = dict[tuple[str | None, str, float], list[Outcome]]
_Boxes = dict[tuple[str, float], tuple[float, float]]
_CHUNK = 64  # images per forward of plain questions


@dataclass(frozen=True)
class Size:
    """How much is tried.

    Attributes:
        images: right at first, the first of the test set. steps: few and many. restarts: starts of the few.
        queries: most answers to a clean image in the null control.
    """

    images: int
    steps: tuple[int, int] = (10, 50)
    restarts: int = 5
    queries: int = 1000


def size_for(images: int, stochastic: bool) -> Size:
    """How much is tried; of a random model, whose every gradient is the mean of many, fewer images and steps."""
    return Size(max(1, images // 4), (4, 20), queries=500) if stochastic else Size(images)


class Probing:
    """Gathers the first images that a model gets right, and probes the model on them.

    Nothing here is charged to an attacker, and nothing enters the report's records. Small attacks run as trials, so
    that they are verified as all others, and a broken run goes on where it stopped.

    Args:
        model: as it is deployed; probed in eval mode and restored.
        images: looked at, right at first; a quarter of a random model's.
        limit: images seen for that, those wrong at first included; None: ten times as many.
        output: what the model returns.
        data: name and split of the data set.
        dirpath: folder for the records of the small attacks; None: nothing is written.
        progress: whether to show a progress bar.

    Raises:
        ValueError: no image is to be looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        images: int = IMAGES,
        limit: int | None = None,
        output: Output = "logits",
        data: str = "",
        dirpath: Path | None = None,
        progress: bool = False,
        limits: Thresholds = THRESHOLDS,
    ) -> None:
        if images < 1:
            raise ValueError(f"audit_images must be at least 1, got {images}: leave the audit out with audit false")
        self.model, self.output, self.data, self.dirpath = model, output, data, dirpath
        self.stochastic = bool(getattr(model, "stochastic", False))
        self.size, self.limits, self.progress = size_for(images, self.stochastic), limits, progress
        self._left = 10 * images if limit is None else limit
        self._parts: list[Batch] = []

    @property
    def full(self) -> bool:
        """Whether no further image is needed."""
        return self._left < 1 or self._held >= self.size.images

    @property
    def _held(self) -> int:
        return sum(len(part.label) for part in self._parts)

    def add(self, batch: Batch) -> None:
        """Take on those images that the model gets right, while they are needed."""
        for part in zip(*(torch.split(column, self.size.images) for column in batch), strict=True):
            if self.full:
                return
            x, y, index = (column[: self._left].clone() for column in part)
            self._left -= len(x)
            right = correct(self.model, x, y, None, index, _SEED, _CHUNK, self.output)
            chosen = right.nonzero().squeeze(1)[: self.size.images - self._held]
            if len(chosen):
                self._parts.append(Batch(x[chosen], y[chosen], index[chosen]))

    def audited(self, outcomes: Sequence[Outcome], threats: Iterable[ThreatModel] = ()) -> list[Audited]:
        """Probe the model under each threat model of the outcomes.

        Args:
            threats: of the attacks, for their box; default the box [0, 1].
        """
        boxes: _Boxes = {(threat.norm, threat.radius): threat.box for threat in threats}
        groups: _Groups = {}
        for outcome in outcomes:
            groups.setdefault((outcome.model, outcome.norm, outcome.eps), []).append(outcome)
        if not self._parts:
            nothing = _all_skipped("the model gets no image right")
            return [Audited(*key, nothing) for key in groups]
        surrogates = {outcome.config.get("surrogate") for outcome in outcomes if outcome.access == "gradient"}
        lent = surrogates.pop() if len(surrogates) == 1 else None
        found = []
        with warnings.catch_warnings(), attacking(self.model), torch.no_grad(), self._bar(len(groups)) as bar:
            warnings.simplefilter("ignore", UserWarning)  # what the small attacks say, the findings say too
            batch = Batch(*(torch.cat(column) for column in zip(*self._parts, strict=True)))
            probe = _Probe(self, batch, bar, next(iter(boxes.values()), (0.0, 1.0)), lent)
            shared = probe.of_model()
            for (model, norm, eps), group in groups.items():
                threat = ThreatModel(norm, eps, boxes.get((norm, eps), (0.0, 1.0)))  # type: ignore[arg-type]
                found.append(Audited(model, norm, eps, (*shared, *probe.of_threat(threat, group, outcomes))))
        if probe.failure:
            warnings.warn(
                f"the audit's probes failed ({probe.failure}): the report says so, and its figures stand", stacklevel=2
            )
        return found

    def _bar(self, groups: int) -> tqdm[Any]:
        return tqdm(total=1 + 7 * groups, desc="audit", unit=" probes", disable=None if self.progress else True)


class _Probe:
    """One probing: a model and images that it gets right."""

    def __init__(
        self, probing: Probing, batch: Batch, bar: tqdm[Any], box: tuple[float, float], lent: str | None
    ) -> None:
        self.model, self.output, self.size, self.limits = probing.model, probing.output, probing.size, probing.limits
        self.data, self.dirpath, self.stochastic = probing.data, probing.dirpath, probing.stochastic
        self.x, self.y, self.index = batch
        self.bar, self.box, self.lent, self.failure = bar, box, lent, ""
        self.reject: int | None = getattr(self.model, "reject", None)
        self.gradient: Tensor | None = None
        self.without = ""  # why there is no gradient
        self.restless = False
        self._control: tuple[Tensor, Tensor] | None = None

    def of_model(self) -> list[Finding]:
        """What does not depend on the threat model."""
        found = [self._guarded("repeats", self._repeats), self._guarded("surrogate", self._surrogate)]
        found.append(self._guarded("blind", self._blind))
        self.without = self.without or ("its gradient could not be probed" if self.gradient is None else "")
        return [*found, self._guarded("everything", self._everything)]

    def of_threat(self, threat: ThreatModel, group: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[Finding]:
        """What depends on norm and radius."""
        null = self._guarded("null", lambda: self._null(group, outcomes))
        around, remark = _bounded(threat, group)
        if around is None or self.gradient is None:
            reason = remark if around is None else self.without
            return [null, *(skipped(check, reason) for check in _OF_THREAT if check != "null")]
        remark += f" (through {self.lent})" if self.lent else ""
        try:
            found = self._attacks(around, group)
        except Exception as error:  # whatever a model raises on the audit's questions must not cost the report
            found = [self._failed(check, error) for check in ("single_step", "growth", "gain", "noise")]
        found.append(self._guarded("slope", lambda: self._slope(around)))
        return [null, *(replace(finding, said=finding.said + remark) for finding in found)]

    def _guarded(self, check: str, probe: Callable[[], Finding]) -> Finding:
        try:
            return probe()
        except Exception as error:  # as above
            return self._failed(check, error)

    def _failed(self, check: str, error: Exception) -> Finding:
        self.failure = self.failure or f"{type(error).__name__}: {_first_line(error)}"
        return skipped(check, f"the probe failed ({type(error).__name__}: {_first_line(error)})")

    def _everything(self) -> Finding:
        """Half the box away every image can be made plain grey: those that this breaks an attack must break."""
        if self.gradient is None:
            return skipped("everything", self.without)
        grey = torch.full_like(self.x, sum(self.box) / 2)
        told = fresh_labels(self.model, grey, None, self.index, _SEED, _CHUNK, self.output).mode(1).values
        can = is_adversarial(told, self.y, None, self.reject) & (told >= 0)
        if not can.any():
            return skipped("everything", "plain grey is no success on any of these images")
        threat = ThreatModel("linf", (self.box[1] - self.box[0]) / 2, self.box)
        records = self._tried("linf_0.5", PGD(threat, self.size.steps[1]))
        chosen = records[torch.isin(records.index, self.index[can].cpu())]
        return checks.everything(chosen, self.size.steps[1], self.limits)

    def _attacks(self, threat: ThreatModel, group: Sequence[Outcome]) -> list[Finding]:
        (few, many), radius, limits = self.size.steps, threat.radius, self.limits
        name = f"{threat.norm}_{radius:.4g}"
        one = self._tried(f"{name}_fgsm", PGD(threat, 1, radius, random_start=False))
        short = self._tried(f"{name}_pgd{few}", PGD(threat, few))
        long = self._tried(f"{name}_pgd{many}", PGD(threat, many))
        again = self._tried(f"{name}_pgd{few}x{self.size.restarts}", PGD(threat, few, restarts=self.size.restarts))
        at_random = self._tried(f"{name}_noise", RandomNoise(threat))
        near, far = replace(threat, eps=radius / 2), replace(threat, eps=_doubled(threat))
        nearer, farther = (self._tried(f"{name}_{side}", PGD(t, few)) for side, t in (("half", near), ("double", far)))
        tried = [(near.radius, nearer), (radius, short), (far.radius, farther)]
        return [
            checks.single_step(one, long, many, limits),
            checks.growth(tried, limits),
            checks.gain(short, long, again, self.size.steps, self.size.restarts, _reported(group, radius), limits),
            checks.noise(at_random, one, short, few, limits),
        ]

    def _tried(self, name: str, attack: Attack) -> Records:
        protocol = Protocol(name=name, attack=attack, output=self.output, surrogate=self.lent)
        trial = Trial(protocol, self.model, self.data, None, self.dirpath)
        trial.add(Batch(self.x, self.y, self.index))
        self.bar.update()
        return trial.close().unique()

    def _repeats(self) -> Finding:
        """The same images again, and their first half once more in other company, where rounding is no excuse."""
        if self.stochastic:
            return skipped("repeats", "the model says that it is random")
        first, again = self._answers(self.x), self._answers(self.x)
        found = checks.repeats(first, again, self.limits)
        half = -(-len(self.x) // 2)
        exact = self.x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and _is_exact(first)
        if found.status == "PASS" and exact:
            found = checks.repeats(first[:half], self._answers(self.x[:half]), self.limits)
            found = found if found.status == "WARN" else checks.repeats(first, again, self.limits)
        self.restless = found.status == "WARN"
        return found

    def _answers(self, x: Tensor, answer: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        answer = answer or self.model
        return torch.cat([answer(cast(part, self.model)) for part in torch.split(x, _CHUNK)])

    def _surrogate(self) -> Finding:
        if self.stochastic:
            return skipped("surrogate", "the model is random: no two answers need be the same")
        own = getattr(self.model, "surrogate", None)
        if own is None or self.output == "labels":
            return skipped("surrogate", "gradients go through the deployed forward itself")
        return checks.surrogate(self._answers(self.x, own), self._answers(self.x), self.limits)

    def _blind(self) -> Finding:
        if self.output == "labels":
            self.without = "the model tells labels only"
            return skipped("blind", self.without)
        try:
            gradients = {name: self._value(self.x, loss)[1] for name, loss in _LOSSES.items()}
        except (ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.without = f"the model gives no gradient ({_first_line(error)})"
            if not any(True for _ in self.model.parameters()):
                return skipped("blind", f"{self.without} and has no parameters: it is asked from afar")
            return judged("blind", True, self.without, len(self.x), {"none": 1.0})
        self.gradient = gradients["margin"]
        return checks.blind({name: told.flatten(1).abs().sum(1) for name, told in gradients.items()}, self.limits)

    def _value(self, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """A loss (n,) and its gradient through the surrogate."""
        value, leaf = self._loss(x, loss, True)
        with torch.enable_grad():
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def _loss(self, x: Tensor, loss: Loss = margin, differentiate: bool = False) -> tuple[Tensor, Tensor]:
        """A loss (n,), and the images in its graph; of a random model the mean over draws that are always the same."""
        lent = self.lent if differentiate else None
        oracle = QueryOracle(self.model, len(x), surrogate=lent, index=self.index, seed=_SEED, output=self.output)
        rows = torch.arange(len(x), device=x.device)
        leaf = x.detach().clone().requires_grad_(differentiate)
        draws = EOT if self.stochastic else 1
        with torch.set_grad_enabled(differentiate):
            scores = oracle.scores(leaf.unsqueeze(1).expand(len(x), draws, *x.shape[1:]), rows)
            value: Tensor = loss(scores, self.y, None, self.reject).mean(1)
        return value, leaf

    def _slope(self, threat: ThreatModel) -> Finding:
        assert self.gradient is not None
        flat = self.gradient.flatten(1)
        sound = (flat != 0).any(1) & flat.isfinite().all(1)
        if not sound.any():
            return skipped("slope", "no image has a gradient to follow")
        begin = self._loss(self.x)[0]
        quotients = {}
        for length in (0.02 * threat.radius, 0.25 * threat.radius):
            moved = threat.project(self.x + length * threat.steepest(self.gradient), self.x)
            predicted = (self.gradient * (moved - self.x)).flatten(1).double().sum(1)
            rise = (self._loss(moved)[0] - begin).double()
            known = sound & (predicted > 0)
            quotients[length] = (rise / predicted)[known].nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        self.bar.update()
        if not all(len(told) for told in quotients.values()):
            return skipped("slope", "the box leaves no step along the gradient")
        return checks.slope(quotients, self.limits)

    def _null(self, group: Sequence[Outcome], outcomes: Sequence[Outcome]) -> Finding:
        if not (self.stochastic or self.restless or any(checks.is_random(outcome) for outcome in outcomes)):
            return skipped("null", "the model is not random")
        if self.output in ("labels", "probs"):
            return skipped("null", f"a model with output {self.output} is not asked for the mean of its answers")
        if self._control is None:
            most = max(checks.control_queries(outcome, self.size.queries) for outcome in outcomes)
            self._control = null_control(self.model, self.x, self.y, self.index, most)
        return checks.null(*self._control, group, self.size.queries, self.limits)


def outputs(protocols: Iterable[Protocol]) -> Output:
    """What the model returns, as the protocols say: scores before labels."""
    told = [protocol.output for protocol in protocols]
    return next((output for output in told if output != "labels"), "labels" if told else "logits")


def seen_by(protocols: Iterable[Protocol]) -> int | None:
    """Most images that any of the attacks looks at; None: all."""
    limits = [protocol.max_samples for protocol in protocols]
    return None if None in limits or not limits else max(limit for limit in limits if limit is not None)


def _bounded(threat: ThreatModel, group: Sequence[Outcome]) -> tuple[ThreatModel | None, str]:
    """The threat model to probe under, or None and why not; without a radius that of the attacks' own successes."""
    if threat.norm not in ("linf", "l2"):
        return None, f"probes are made for linf and l2, not for {threat.norm}"
    if threat.radius == 0:
        return None, "the radius is 0"
    if threat.radius < math.inf:
        return threat, ""
    worst = worst_case([outcome.records for outcome in group])
    distance = worst.distance[successes(worst)]
    radius = float(distance.median()) if len(distance) else 0.0
    if not 0 < radius < math.inf:
        return None, "there is no radius, and no success whose distance could stand for it"
    return replace(threat, eps=radius), f" (at {radius:.4g}, the median distance of the successes)"


def _doubled(threat: ThreatModel) -> float:
    widest = threat.box[1] - threat.box[0] if threat.norm == "linf" else math.inf
    return min(2 * threat.radius, widest)


def _reported(group: Sequence[Outcome], radius: float) -> tuple[Tensor, Tensor] | None:
    """Places of the images that untargeted white-box attacks of the report saw, and whether one broke them."""
    parts = [o.records for o in group if o.access == "gradient" and not checks.is_targeted(o)]
    if not parts:
        return None
    rows = Records.cat(parts)
    broken = rows.index[successes(rows) & (rows.distance <= radius * (1 + 1e-4))]
    places = torch.unique(rows.index)
    return places, torch.isin(places, broken)


def _all_skipped(reason: str) -> tuple[Finding, ...]:
    return tuple(skipped(check, reason) for check in (*_OF_MODEL, *_OF_THREAT))


def _is_exact(answer: Tensor) -> bool:
    return answer.dtype in (torch.float32, torch.float64, torch.int64)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
