"""Our side of the comparison: the same settings as the other libraries' as nearly as both allow."""

from collections.abc import Callable
from typing import Any

import torch
from peers_adapters import SAMPLES, SIGMA, SIMBA_STEP, STEP, Peer, Task
from torch import Tensor, nn

from lit_adv import attacks, estimators
from lit_adv.attack import Attack
from lit_adv.estimator import GradientEstimator
from lit_adv.losses import margin
from lit_adv.oracle import Access, QueryOracle
from lit_adv.result import AttackResult
from lit_adv.threat import ThreatModel


class Ours:
    """An attack that keeps its last result, whose ledger is held against the count at the model."""

    def __init__(self, net: nn.Module, task: Task, attack: Attack) -> None:
        self.net, self.task, self.attack = net, task, attack
        self.result: AttackResult

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        access = max(self.attack.access, Access.LABEL)
        # as an evaluation does it: the images are known to be right at first
        oracle = QueryOracle(self.net, len(x), access, budget=self.task.budget, known_right=True)
        self.result = self.attack(oracle, x, y, target, torch.arange(len(x)))
        return self.result.x_adv


def _ours(words: str, make: Callable[[ThreatModel, Task], Attack]) -> Peer:
    def prepare(net: nn.Module, task: Task) -> Ours:
        return Ours(net, task, make(ThreatModel(task.norm, task.eps), task))

    return Peer("lit_adv", "lit_adv", words, prepare, "own")


def _probing(words: str, estimator: GradientEstimator, queries: int, **settings: Any) -> Peer:
    """Projected gradient ascent from the image, by an estimator that asks so many queries a step."""

    def make(threat: ThreatModel, task: Task) -> Attack:
        steps = max(1, task.budget // (queries + 1))
        return attacks.PGD(threat, steps, STEP, random_start=False, estimator=estimator, **settings)

    return _ours(words, make)


OURS: dict[str, list[Peer]] = {
    "NES": [
        _probing(
            "PGD by its estimator: 25 pairs + 1 a step, sigma 0.01, step 0.03",
            estimators.NES(samples=SAMPLES, sigma=SIGMA),
            SAMPLES,
        )
    ],
    "SPSA": [
        _probing(
            "PGD by its estimator: 25 pairs + 1 a step, delta 0.01, signs, step 0.03",
            estimators.SPSA(directions=SAMPLES // 2, delta=SIGMA, direction="signs", clip="none"),
            SAMPLES,
            loss=margin,
        )
    ],
    "Bandits": [
        _probing("PGD by its estimator: 2 + 1 queries a step, 14 x 14 tiles, step 0.03", estimators.Bandits(tile=14), 2)
    ],
    "FD with RG-8": [
        _probing(
            "98 groups of 8 pixels, two-sided, delta 0.01, margin, step 0.06",
            estimators.FiniteDifference(estimators.RandomGroups(8), delta=0.01),
            196,
            loss=margin,
        )
    ],
    "Square": [_ours("{budget} queries, p 0.8", lambda threat, task: attacks.Square(threat, task.budget, p_init=0.8))],
    "SimBA": [_ours("pixels, step 0.2", lambda threat, task: attacks.SimBA(threat, step_size=SIMBA_STEP))],
    "HopSkipJump": [
        _ours("steps from 100 samples, to the end of the budget", lambda threat, task: attacks.HopSkipJump(threat))
    ],
    "Boundary": [_ours("to the end of the budget", lambda threat, task: attacks.Boundary(threat))],
    "GenAttack": [
        _ours(
            "generations of 10, rate 0.3, alpha 0.5, targeted",
            lambda threat, task: attacks.GenAttack(threat, population=10, mutation_rate=0.3, alpha=0.5),
        )
    ],
    "PSO": [_ours("swarm of 100", lambda threat, task: attacks.PSO(threat))],
    "ZOO": [
        _ours(
            "{iterations} steps of 257, lr 0.03, c 10, pixels",
            lambda threat, task: attacks.ZOO(
                threat, task.budget // 257, 1, step_size=0.03, space="pixel", constant=10.0, early_stop=None
            ),
        )
    ],
    "NAttack": [
        _ours(
            "populations of 100, step 0.02, shrink 0.1",
            lambda threat, task: attacks.NAttack(threat, samples=100, step_size=0.02, shrink=0.1),
        )
    ],
}
