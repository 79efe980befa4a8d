"""Mean start: an attack on f_a alone from the mean of what g makes of the image, far outside any small ball."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from lit_adv.answers import evaluating
from lit_adv.attack import Attack, IterativeAttack, Search, State
from lit_adv.draws import Draws
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

_MEAN = -7  # key of the draws over which g is averaged, apart from those of queries


class MeanStart(IterativeAttack):
    """Runs an attack on the classifier inside a transformation, around E g(x) instead of x, and tries the result once.

    A diagnostic, invalid by construction: g moves an image by up to its own delta, so what is returned lies about
    that far from x, whatever the radius of the attack around E g(x). It is judged in the box alone, its distance is
    reported beside, and it says nothing about a small ball. E g(x), the attack inside and f_a are free of charge; the
    model under attack sees one image, as a check.

    Departure from the paper: E g(x) is clipped to the box, since what leaves it is no image.

    Args:
        attack: what is run on f_a, e.g. :class:`~lit_adv.attacks.PGD`; its radius is around E g(x), and its norm and
            seed are this attack's.
        draws: of g, over which the mean is taken.
        part: name of the classifier inside, which sees what g makes.

    Raises:
        ValueError: no attack, ``draws`` below 1; when called: a model without ``transform`` or without the part.
    References:
        Xiao & Zheng 2020, "One Man's Trash is Another Man's Treasure", CVPR, section 4.1.
    """

    steps = 1
    access = Access.GRADIENT
    needs_whole_step = False
    looks_first = True
    eot = None  # what is differentiated is the part inside, where nothing is random

    def __init__(self, attack: Attack, draws: int = 30, part: str = "classifier") -> None:
        if not isinstance(attack, Attack):
            raise ValueError(f"attack must be an attack on the classifier inside, e.g. PGD(), got {attack!r}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.attack, self.draws, self.part, self.seed = copy.copy(attack), draws, part, attack.seed
        if hasattr(attack, "stop_at_hit"):
            self.attack.stop_at_hit = False  # type: ignore[attr-defined]
        self.threat = replace(attack.threat, eps="inf")

    def with_threat(self, threat: ThreatModel) -> MeanStart:
        """A copy whose attack inside has another threat model; the box alone bounds what is returned."""
        other = super().with_threat(replace(threat, eps="inf"))
        other.attack = self.attack.with_threat(threat)
        return other

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return 1

    def start(self, search: Search, rows: Tensor) -> State:
        return State(**search.fresh(rows))

    def step(self, search: Search, state: State) -> State:
        """Ask nothing: the loop's last look at the row is the one query."""
        model = search.oracle.model
        inside = getattr(model, self.part, None)
        if not callable(getattr(model, "transform", None)) or not isinstance(inside, nn.Module):
            raise ValueError(
                f"MeanStart attacks a defence that transforms images (method transform, network {self.part!r}), and "
                f"{type(model).__name__} is none: attack it by itself"
            )
        attack = copy.copy(self.attack)
        attack.seed = search.seed
        with evaluating(model):
            middle = mean_transform(model, state.x0, self.draws, search.index[state.rows], search.seed)
            middle = self.threat.project(middle.to(state.x0.dtype), state.x0)
            oracle = QueryOracle(inside, len(state), known_right=True)
            found = attack(oracle, middle, state.y, state.target, search.index[state.rows])
        search.count("images fooled the classifier inside", found.success)
        state.x = self.threat.project(found.x_adv.to(state.x0.dtype), state.x0)
        return state


def mean_transform(model: nn.Module, x: Tensor, draws: int, index: Tensor, seed: int = 0) -> Tensor:
    """E g(x) over fresh draws of a model's ``transform``, not clipped: (n, C, H, W).

    Args:
        index: places of the images in their data set, (n,), which key the draws.
    """
    total = torch.zeros_like(x)
    for number in range(draws):
        total += transformed(model, x, index, number, seed)
    return total / draws


def transformed(model: nn.Module, x: Tensor, index: Tensor, number: int, seed: int = 0) -> Tensor:
    """Draw ``number`` of g(x), the same in any batch: (n, C, H, W)."""
    keyed = Draws(seed, index, torch.full_like(index, number), _MEAN)
    made: Tensor = model.transform(x, keyed)  # type: ignore[operator]
    return made.to(x.dtype)
