"""DeepFool: straight to the nearest of the planes that decision boundaries look like, again and again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.hyperplanes import Planes, nearest_planes, noticed, rivals_at
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

_PUSH = 1e-4  # that a step goes beyond its plane, in l2


@dataclass(kw_only=True)
class DeepFoolState(State):
    """Adds the classes whose boundaries are looked at, (n, k), and the sum of all steps, (n, C, H, W)."""

    rivals: Tensor
    moved: Tensor


class DeepFool(IterativeAttack):
    """Steps to the nearest boundary of the linearised classifier, until the decision is another.

    Of the classes k likeliest at the clean image the one with the least ``|f_k| / |w_k|`` (dual norm), f_k its score
    less the label's and w_k the gradient of that, gives the step ``r += |f_k| / |w_k|`` along the steepest direction;
    the image is ``x0 + (1 + overshoot) r``, cut to the box. A row ends at its first adversarial image, whatever the
    radius: that decides success, as with all minimum-norm attacks.

    A targeted row has one plane, between its target and the strongest other class. A detector's refusal counts as the
    label where it speaks louder, so the plane is that of both at once.

    Departures from the paper: images are cut to the box; each step goes 1e-4 (in l2) beyond its plane, as the
    authors' code does; dual norms are at least 1e-8; the clean image is asked once more for its likeliest classes, as
    a check; where the threat rounds to levels no step is so short that rounding undoes it.

    Args:
        threat: norm (linf, l2), radius and box; ``"inf"``: any distance is a success.
        steps: most steps.
        overshoot: share by which the sum of all steps is stretched, >= 0.
        classes: most classes looked at, the label among them; each but the label costs a backward pass a step.
        eot: draws of a random model over which gradients and scores are averaged.

    Raises:
        ValueError: an argument out of its range, or a norm without a rule.
    References:
        Moosavi-Dezfooli, Fawzi & Frossard 2016, https://arxiv.org/abs/1511.04599, algorithm 2, section 3.3 for
        other norms; 50 steps, 0.02 and 10 classes as in the authors' code.
    """

    access = Access.GRADIENT
    minimizes_distance = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("l2", "inf"),  # noqa: B008 - frozen
        steps: int = 50,
        overshoot: float = 0.02,
        classes: int = 10,
        eot: int | None = None,
    ) -> None:
        check_threat(threat)
        if threat.norm not in ("linf", "l2"):
            raise ValueError(f"DeepFool has rules for linf and l2, got norm {threat.norm!r}: choose one of them")
        for name, value, least in (("steps", steps, 1), ("classes", classes, 2), ("eot", 1 if eot is None else eot, 1)):
            if value < least or value != int(value):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")
        if not 0 <= overshoot < math.inf:
            raise ValueError(f"overshoot must be a finite number >= 0 (the authors': 0.02), got {overshoot}")
        self.threat, self.steps, self.overshoot, self.classes, self.eot = threat, steps, overshoot, classes, eot

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self.eot or 1

    def start(self, search: Search, rows: Tensor) -> DeepFoolState:
        fields = search.fresh(rows)
        rivals, _, unknown = rivals_at(search, rows, self.classes, self.eot or 1)
        fields["done"] = unknown | (self.threat.radius == 0)
        if search.watch:
            fields["done"] |= search.distance[rows].isfinite()  # wrong from the first
        return DeepFoolState(**fields, rivals=rivals, moved=torch.zeros_like(fields["x0"]))

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, DeepFoolState)
        going = (~state.done).nonzero().squeeze(1)
        if not len(going):
            return state
        part = state if len(going) == len(state) else state[going]
        planes = nearest_planes(search, part, part.rivals, self.eot or 1)
        # a draw or a stand-in of the model may err, so a search goes on until it has a hit that counts
        over = search.distance[part.rows].isfinite() if search.watch else planes.won
        moved = part.moved + noticed(self.threat, self._step(planes))
        x = (part.x0 + (1 + self.overshoot) * moved).clamp(*self.threat.box)
        x = torch.where(over[:, None, None, None], part.x, x)
        if not search.oracle.stochastic:  # elsewhere the next draw may lead on
            over = over | (x == part.x).flatten(1).all(1)
        state.moved = state.moved.index_put((going,), moved)
        state.x, state.done = state.x.index_put((going,), x), state.done.index_put((going,), over)
        return state

    def _step(self, planes: Planes) -> Tensor:
        """Onto the plane and a little farther, (n, C, H, W); nothing where there is none."""
        far = torch.where(planes.distance.isfinite(), planes.distance, 0.0)
        if self.threat.norm == "linf":
            push = _PUSH / math.sqrt(planes.normal[0].numel())
            return (far + push)[:, None, None, None] * planes.normal.sign()
        size = planes.normal.flatten(1).norm(dim=1).clamp_min(1e-8)
        return ((far + _PUSH) / size)[:, None, None, None] * planes.normal

    def perturb(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        return self.threat.project(super().perturb(oracle, x, y, target, index), x)
