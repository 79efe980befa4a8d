"""Projected gradient ascent, with any gradient estimator: FGSM, BIM, MI-FGSM and PGD are settings of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.draws import Draws
from lit_adv.estimator import GradientEstimator
from lit_adv.estimators.autograd import Autograd
from lit_adv.losses import Loss, cross_entropy
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel


@dataclass(kw_only=True)
class PGDState(State):
    """Adds the accumulated gradient and the estimator's memory."""

    momentum: Tensor
    memory: Tensor


class PGD(IterativeAttack):
    """Steps of steepest ascent of the loss, each projected into ball and box.

    FGSM: ``steps=1, step_size=eps, random_start=False``. Iterative FGS (BIM): ``random_start=False``. MI-FGSM:
    ``decay=1.0``. Targeted attacks ascend the target's loss. A black-box attack arises from an estimator that reads
    values only.

    Args:
        threat: norm, radius and box.
        steps: gradient steps per start.
        step_size: length of a step in the norm, pixel units; None: ``2.5 eps / steps``.
        random_start: begin at a uniform random point of the ball instead of at the image.
        restarts: random starts of an unbroken image.
        loss: what is ascended, see :mod:`lit_adv.losses`.
        decay: of the accumulated, l1-normalised gradient; 0 for none.
        estimator: where the gradient comes from.
        stop_at_hit: False runs all steps of every image.
        seed: of the random starts and of an estimator's directions.

    Raises:
        ValueError: an argument out of its range.
    References:
        Madry et al. 2018, https://arxiv.org/abs/1706.06083, section 2.1; Goodfellow et al. 2015,
        https://arxiv.org/abs/1412.6572 (FGSM); Kurakin et al. 2017, https://arxiv.org/abs/1607.02533 (BIM);
        Dong et al. 2018, https://arxiv.org/abs/1710.06081 (MI-FGSM). The default step size is that of Madry et
        al.'s CIFAR-10 challenge, 2.5 eps / steps; their tables give 0.01 of 0.3 (MNIST) and 2/255 of 8/255.
    """

    def __init__(
        self,
        threat: ThreatModel = ThreatModel(),  # noqa: B008 - frozen
        steps: int = 40,
        step_size: float | None = None,
        random_start: bool = True,
        restarts: int = 1,
        loss: Loss = cross_entropy,
        decay: float = 0.0,
        estimator: GradientEstimator = Autograd(),  # noqa: B008 - frozen
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if steps < 1 or restarts < 1 or steps != int(steps):
            raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
        if step_size is not None and not step_size >= 0:
            raise ValueError(f"step_size must be >= 0 in pixel units, or None for 2.5 eps / steps, got {step_size}")
        if not decay >= 0:
            raise ValueError(f"decay must be >= 0, got {decay}")
        if step_size is None and threat.radius == float("inf"):
            raise ValueError("step_size must be given where eps is inf")
        self.threat, self.steps, self.step_size = threat, steps, step_size
        self.random_start, self.restarts, self.loss, self.decay = random_start, restarts, loss, decay
        self.looks_first = random_start
        self.estimator, self.stop_at_hit, self.seed = estimator, stop_at_hit, seed
        self.access = Access.GRADIENT if estimator.needs_gradient else Access.PROBS

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self.estimator.cost(shape)

    def start(self, search: Search, rows: Tensor) -> PGDState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        if self.random_start:
            draws = search.starting_draws(rows)
            fields["x"] = random_point(self.threat, x0, draws)
        momentum = torch.zeros_like(x0) if self.decay else x0.new_zeros(len(x0), 0)
        return PGDState(**fields, momentum=momentum, memory=self.estimator.init(x0))

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, PGDState)

        def objective(x: Tensor) -> Tensor:
            return self.loss(search.scores(x, state), state.y, state.target, search.reject)

        draws = search.draws(state)
        _, gradient, state.memory = self.estimator(objective, state.x, state.memory, draws, self.threat.box)
        if self.decay:
            gradient = gradient.nan_to_num(0, 0, 0)  # else one bad pixel would freeze the whole image for good
            size = gradient.abs().mean((1, 2, 3), keepdim=True)
            state.momentum = gradient = self.decay * state.momentum + gradient / size.clamp_min(1e-30)
        moved = state.x + self.threat.steepest(gradient).mul_(self._step_size())
        state.x = self.threat.project(moved, state.x0)
        return state

    def _step_size(self) -> float:
        return 2.5 * self.threat.radius / self.steps if self.step_size is None else self.step_size


def random_point(threat: ThreatModel, x0: Tensor, draws: Draws) -> Tensor:
    """A uniform random point of the ball around each image, moved into the box: (n, C, H, W).

    linf: uniform in the cube. l2: a uniform direction, the radius distributed as in the ball. Elsewhere, and in an
    unbounded ball, the clean image.
    """
    if threat.radius in (0, float("inf")):
        return x0
    if threat.norm == "linf":
        noise = draws.uniform(*x0.shape[1:], low=-threat.radius, high=threat.radius, dtype=x0.dtype)
    elif threat.norm == "l2":
        noise = draws.normal(*x0.shape[1:], dtype=x0.dtype)
        length = draws.uniform(dtype=x0.dtype) ** (1 / noise[0].numel() if len(noise) else 1)
        noise = noise / noise.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
        noise = noise * (threat.radius * length)[:, None, None, None]
    else:
        return x0
    return threat.project(x0 + noise, x0)
