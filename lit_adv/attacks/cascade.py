"""Cascade: several attacks in a row, each on what those before it left unbroken."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lit_adv.attack import Attack, Finished, check_images, check_labels, check_rows, check_threat
from lit_adv.oracle import Access, AccessDenied, QueryOracle
from lit_adv.result import AttackResult, added, broken_by
from lit_adv.threat import ThreatModel


class Cascade(Attack):
    """Runs attacks one after another; an image that one has broken is spared by the next.

    The result is the worst case over all of them at the price of little more than the first: an ensemble in the
    spirit of AutoAttack. Queries, checks and iterations of an image add up over the attacks that saw it. What each
    attack saw and broke is counted by name. Of an image that none breaks the nearest adversarial one found outside the
    ball is kept, or else the last attack's candidate.

    Args:
        threat: norm, radius and box of all its attacks; theirs give way to it.
        attacks: the attacks by name, in order; cheap and strong ones first.
        seed: of all its attacks.

    Raises:
        ValueError: no attack, or something that is none.
    References:
        Croce & Hein 2020, https://arxiv.org/abs/2003.01690, section 5 (AutoAttack).
    """

    def __init__(self, threat: ThreatModel, attacks: Mapping[str, Attack], seed: int = 0) -> None:
        check_threat(threat)
        if not isinstance(attacks, Mapping) or not attacks:
            raise ValueError(f"attacks must name at least one attack, e.g. {{'pgd': PGD()}}, got {attacks!r}")
        for name, attack in attacks.items():
            if not isinstance(attack, Attack):
                raise ValueError(f"attacks[{name!r}] must be an attack, e.g. PGD(), got {attack!r}")
            _check_serves(name, attack, threat)
        self.threat, self.seed = threat, seed
        self.attacks = {name: _with_seed(attack.with_threat(threat), seed) for name, attack in attacks.items()}
        self.access = max(attack.access for attack in attacks.values())

    def with_threat(self, threat: ThreatModel) -> Self:
        other = super().with_threat(threat)
        other.attacks = {name: attack.with_threat(threat) for name, attack in self.attacks.items()}
        return other

    @property
    def models(self) -> list[nn.Module]:
        """Local models of its attacks."""
        return [model for attack in self.attacks.values() for model in getattr(attack, "models", [])]

    @property
    def needs_fit(self) -> bool:
        return any(attack.needs_fit for attack in self.attacks.values())

    @property
    def fitted_on(self) -> str:
        return "+".join(attack.fitted_on for attack in self.attacks.values() if attack.fitted_on)

    def fit(self, images: Tensor, labels: Tensor, path: str | None = None) -> None:
        for name, attack in self.attacks.items():
            if attack.needs_fit:
                attack.fit(images, labels, None if path is None else f"{path}.{name}")

    def __call__(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
        finished: Finished | None = None,
    ) -> AttackResult:
        if not isinstance(oracle, QueryOracle):
            oracle = QueryOracle(oracle, len(x))
        if oracle.access < self.access:
            raise AccessDenied(
                f"Cascade needs {self.access.name} access and was granted {oracle.access.name}: grant more, or leave "
                "out the attacks that need it"
            )
        check_images(x, self.threat, oracle.device, oracle.dtype)
        y, target = check_labels(y, target, x)
        check_rows(x, oracle, index)
        with torch.inference_mode(False):
            x = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach().clone()
            index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device).clone()
            oracle.index = index
            oracle.queries, oracle.nonfinite = oracle.queries.clone(), oracle.nonfinite.clone()
            rows = _Rows(x, y, target, index)
            return self._stages(oracle, rows, finished)

    def _stages(self, oracle: QueryOracle, rows: _Rows, finished: Finished | None) -> AttackResult:
        left = torch.arange(len(rows.x), device=rows.x.device)
        total = replace(_nothing(rows.x, oracle), counts=dict.fromkeys(map(broken_by, self.attacks), (0, 0)))
        names = list(self.attacks)
        for number, attack in enumerate(self.attacks.values()):
            part = oracle.part(left)
            part.known_right = oracle.known_right or number > 0  # the first has looked at the clean image
            final = number + 1 == len(names)
            if attack.access in (Access.LABEL, Access.GRADIENT):  # which no stand-in may answer
                part.trust_only_the_model()
            stage = _Stage(total, left, names[: number + 1], final, finished)
            try:
                found = attack(part, *rows.of(left), finished=stage.ended)
            except ValueError as error:
                raise ValueError(f"attacks[{names[number]!r}]: {error}") from error
            if isinstance(attack, Cascade):  # whose attacks may be called as ours are
                inner = {f"{names[number]}: {name}": pair for name, pair in found.counts.items()}
                found = replace(found, counts=inner)
            oracle.settle(left, part)
            total = replace(
                _placed(total, left, _after(stage.before, found)), counts=added([stage.tally, found.counts])
            )
            left = left[~found.success]
        return total


class _Stage:
    """Hears of rows that end within one attack of a cascade, and counts and tells those that end with it.

    Counted when they end, images add up to the same however often a run is broken off and gone on with.

    Args:
        total: what the attacks before have found. left: rows that this one sees. names: of the attacks so far.
        final: whether it is the last. finished: who is told.
    """

    def __init__(
        self, total: AttackResult, left: Tensor, names: list[str], final: bool, finished: Finished | None
    ) -> None:
        self.before, self.tally = total[left], dict(total.counts)
        self.left, self.names, self.final, self.finished = left, names, final, finished

    def ended(self, places: Tensor, result: AttackResult) -> None:
        """Rows, by their places among those seen, and what was found on them."""
        over = torch.ones_like(result.success) if self.final else result.success
        chosen = over.nonzero().squeeze(1)
        if not len(chosen):
            return
        won = {broken_by(self.names[-1]): (int(result.success.sum()), 0)}
        self.tally = added([self.tally, won, *({broken_by(name): (0, len(chosen))} for name in self.names)])
        if self.finished is not None:
            told = _after(self.before[places[chosen]], result[chosen])
            self.finished(self.left[places[chosen]], replace(told, counts=self.tally))


@dataclass(frozen=True)
class _Rows:
    """What an attack is called with."""

    x: Tensor
    y: Tensor
    target: Tensor | None
    index: Tensor

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        target = None if self.target is None else self.target[rows]
        return self.x[rows], self.y[rows], target, self.index[rows]


def _check_serves(name: str, attack: Attack, threat: ThreatModel) -> None:
    """Have the attack's own constructor look at the threat model: it knows which ones it has rules for."""
    made: Any = type(attack)
    known = inspect.signature(made).parameters
    names = [argument for argument in known if argument != "threat"]
    if "threat" not in known or not all(hasattr(attack, argument) for argument in names):
        return
    try:
        made(threat=threat, **{argument: getattr(attack, argument) for argument in names})
    except ValueError as error:
        raise ValueError(f"attacks[{name!r}]: {error}") from error


def _with_seed(attack: Attack, seed: int) -> Attack:
    other = copy.copy(attack)
    other.seed = seed
    if isinstance(other, Cascade):
        other.attacks = {name: _with_seed(part, seed) for name, part in other.attacks.items()}
    return other


def _nothing(x: Tensor, oracle: QueryOracle) -> AttackResult:
    zero = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return AttackResult(
        x_adv=x.clone(),
        success=zero.bool(),
        distance=torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device),
        queries=oracle.queries.clone(),
        checks=zero,
        first_hit=zero - 1,
        iterations=zero.clone(),
        trace=torch.zeros(0, 4, dtype=torch.float64, device=x.device),
    )


def _after(before: AttackResult, found: AttackResult) -> AttackResult:
    """What an attack found on rows that others have tried before; its queries go on from theirs."""
    nearer = found.success | (found.distance < before.distance) | (before.distance == torch.inf)
    return replace(
        found,
        x_adv=torch.where(nearer[:, None, None, None], found.x_adv, before.x_adv.to(found.x_adv.dtype)),
        distance=torch.where(nearer, found.distance, before.distance.to(found.distance.dtype)),
        checks=before.checks + found.checks,
        iterations=before.iterations + found.iterations,
        trace=torch.cat([before.trace, found.trace]),
    )


def _placed(total: AttackResult, rows: Tensor, found: AttackResult) -> AttackResult:
    """The results of some rows put among those of all."""
    names = ("x_adv", "success", "distance", "queries", "checks", "first_hit", "iterations")
    columns = {name: getattr(total, name).index_put((rows,), getattr(found, name)) for name in names}
    others = ~torch.isin(total.trace[:, 0].long(), rows)
    trace = found.trace.clone()
    trace[:, 0] = rows[trace[:, 0].long()].to(trace.dtype)
    trace = torch.cat([total.trace[others], trace])
    return AttackResult(**columns, trace=trace, nonfinite=total.nonfinite + found.nonfinite)
