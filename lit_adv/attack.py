"""Attacks: what they are given, what they give back, and the one loop of all iterated ones."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any, Self

import torch
from torch import Tensor, nn

from lit_adv.answers import evaluating
from lit_adv.oracle import Access, AccessDenied, QueryOracle
from lit_adv.result import AttackResult
from lit_adv.search import Search
from lit_adv.state import State
from lit_adv.threat import ThreatModel

__all__ = ["Attack", "AttackResult", "IterativeAttack", "Search", "State"]

EOT = 20
"""Draws of a random model over which a gradient is averaged, unless said otherwise (AutoAttack's number)."""

Finished = Callable[[Tensor, AttackResult], None]


class Attack(ABC):
    """A search for adversarial images, set up by its constructor and free of any model.

    Attributes:
        threat: norm, radius and box.
        access: the least it needs.
        seed: of all its random numbers; a row's depend on (seed, image index, step) alone.
    """

    threat: ThreatModel
    access: Access
    seed: int = 0

    @abstractmethod
    def __call__(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
        finished: Finished | None = None,
    ) -> AttackResult:
        """Attack a batch of images; pass many at once, for they share forwards.

        Args:
            oracle: the ledger around the model under attack; a bare module is wrapped with all access and no limit.
            x: clean images (B, C, H, W), floating point, in the box.
            y: true labels (B,) int64.
            target: target classes (B,), or None for an untargeted attack.
            index: places of the images in their data set, for random numbers; default ``arange(B)``.
            finished: told (rows, their result) as rows end.

        Raises:
            ValueError: images, labels or targets that no attack can work on. AccessDenied: too little is granted.
        """

    def bind(self, model: nn.Module, **oracle: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The attack on a fixed model: ``atk = attack.bind(model); x_adv = atk(images, labels)``.

        Args:
            model: images to logits. oracle: further arguments of :class:`QueryOracle`, e.g. ``budget=1000``.
        """

        def bound(images: Tensor, labels: Tensor) -> Tensor:
            return self(QueryOracle(model, len(images), **oracle), images, labels).x_adv

        return bound

    def with_threat(self, threat: ThreatModel) -> Self:
        """A copy under another threat model, all else equal."""
        other = copy.copy(self)
        other.threat = threat
        return other

    @property
    def needs_fit(self) -> bool:
        """Whether it must still learn from training images."""
        return False

    @property
    def fitted_on(self) -> str:
        """Hash of what it has learnt from; empty where it learns nothing."""
        return ""

    def fit(self, images: Tensor, labels: Tensor, path: str | None = None) -> None:
        """Learn from training images; only some attacks do.

        Args:
            path: file that keeps what was learnt: read where it stems from these very images, else written.
        """
        return


class IterativeAttack(Attack):
    """An attack in steps, run over a pool of rows that is refilled as images finish.

    A row leaves in the step that breaks it and a queued one takes its place, so forwards stay full; each row has its
    own step counter and its own random numbers, so its result is the same alone and in any batch, up to rounding.

    Attributes:
        steps: most steps of a row in one start.
        restarts: starts of a row, while it is unbroken.
        minimizes_distance: the nearest hit is kept. With ``stop_at_hit`` and a finite radius a row ends all the same
            as soon as a hit lies within it.
        stop_at_hit: False, for a paper's tables: run all steps and keep the last hit; the first is noted all the same.
        needs_whole_step: False where every sample of a step is a candidate by itself, so that a budget that ends
            within a step is spent to the last query.
        looks_first: it begins elsewhere than at the clean image, so in a bare call that is asked about before.
        eot: draws of a random model over which gradients are averaged; None: 1, or :data:`EOT` where the model says
            that it is random.
        confidence: least margin of the scores with which an adversarial image counts; fresh answers that confirm a
            doubtful one need only be adversarial.
        leaving: told the states of rows as their starts end, after the last check; for those who want to know where
            a search stood. No part of what an attack is.
    """

    steps: int
    restarts: int = 1
    minimizes_distance: bool = False
    stop_at_hit: bool = True
    needs_whole_step: bool = True
    looks_first: bool = False
    eot: int | None = 1
    confidence: float = 0.0
    leaving: Callable[[Any], None] | None = None

    @abstractmethod
    def start(self, search: Search, rows: Tensor) -> State:
        """The state of rows about to begin, (n,) places in the caller's batch; may be empty."""

    @abstractmethod
    def step(self, search: Search, state: State) -> State:
        """One step of every row; a row's own step number is ``state.t``."""

    @abstractmethod
    def cost(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        """Images each row may ask about in its next pass, one number or (n,); without a state the typical number."""

    def adapted(self, stochastic: bool) -> Self:
        """The attack as it goes about a model that does or does not draw random numbers."""
        if self.eot is not None:
            return self
        other = copy.copy(self)
        other.eot = EOT if stochastic else 1
        return other

    def least(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        """Images a row must be able to pay for to begin its next pass; less, and the row ends. Default: its cost."""
        return self.cost(shape, state)

    def __call__(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
        finished: Finished | None = None,
    ) -> AttackResult:
        with torch.inference_mode(False):
            return self._attack(oracle, x, y, target, index, finished)

    def _attack(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        index: Tensor | None,
        finished: Finished | None,
    ) -> AttackResult:
        if not isinstance(oracle, QueryOracle):
            oracle = QueryOracle(oracle, len(x))
        check_images(x, self.threat, oracle.device, oracle.dtype)
        y, target = check_labels(y, target, x)
        check_rows(x, oracle, index)
        if oracle.access < self.access:
            raise AccessDenied(
                f"{type(self).__name__} needs {self.access.name} access and was granted {oracle.access.name}: grant "
                "more, or choose an attack that needs less"
            )
        with attacking(*oracle.models) as was_training, torch.no_grad():
            if was_training:
                warnings.warn(
                    f"{type(oracle.model).__name__} was in training mode: it is attacked in eval mode and restored",
                    stacklevel=3,
                )
            # what was made in inference mode can neither enter a graph nor be updated in place outside it
            x = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
            x = x.clone() if x.is_inference() else x
            oracle.queries, oracle.nonfinite = oracle.queries.clone(), oracle.nonfinite.clone()
            oracle.index = torch.arange(len(x), device=x.device) if index is None else index.to(x.device).clone()
            attack = self.adapted(oracle.random_gradient)
            search = Search(attack, oracle, x, y, target, oracle.index, finished)
            result = attack._run(search, torch.arange(len(x), device=x.device))
        attack._warn(search)
        return result

    def _warn(self, search: Search) -> None:
        """Say what makes a gradient useless."""
        if self.access != Access.GRADIENT or not len(search.x0):
            return
        name, model = type(self).__name__, type(search.oracle.model).__name__
        if search.oracle.random_gradient and self.eot == 1:
            warnings.warn(
                f"{model} is random, and {name} with eot=1 follows the gradient of one draw at a time: leave eot out "
                f"({EOT} draws a step) or raise it",
                stacklevel=5,
            )
        blind = int(search.blind.sum())
        if 10 * blind >= len(search.x0):
            warnings.warn(
                f"{name}: the gradient was exactly 0 or not finite for {blind} of {len(search.x0)} images of {model}: "
                "it tells nothing there; give the model a surrogate, or attack it as a black box",
                stacklevel=5,
            )

    def _run(self, search: Search, waiting: Tensor) -> AttackResult:
        waiting = search.look(waiting)
        state = self.start(search, waiting[:0])
        each = max(1, int(self.cost(search.x0.shape[1:])))
        while len(state) or len(waiting):
            state, anew = search.retire(state)  # first of all, so that those who wait take their places at once
            waiting = torch.cat([waiting, anew]) if len(anew) else waiting
            room = self._room(search, state, each)
            if room > 0 and len(waiting):
                few = len(waiting) - room <= (room + len(state)) // 4  # a few stragglers alone would not fill forwards
                if few and self.access != Access.GRADIENT:  # a graph larger than the chunk would be made twice
                    room = len(waiting)
                fresh, anew = search.retire(self.start(search, waiting[:room]))  # some have nothing to try
                state, waiting = state + fresh, torch.cat([waiting[room:], anew])
            if len(state):
                state = self.step(search, state)
                state.t = state.t + (~state.inside).long()
        return search.result()

    def _room(self, search: Search, state: State, each: int) -> int:
        """How many more rows fill one forward; never more than it holds images."""
        chunk = search.oracle.chunk
        if not len(state):
            return max(1, chunk // each)
        used = self.cost(search.x0.shape[1:], state)
        if not isinstance(used, Tensor):
            return max(1, chunk // each) - len(state)
        return min((chunk - int(used.sum())) // each, chunk - len(state))

    def perturb(
        self,
        oracle: QueryOracle | nn.Module,
        x: Tensor,
        y: Tensor,
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Just the steps, nothing watched and nothing checked: adversarial images for training, (B, C, H, W).

        Args:
            index: None draws fresh numbers from torch's generator at every call.
        """
        with torch.inference_mode(False):
            return self._perturb(oracle, x, y, target, index)

    def _perturb(
        self, oracle: QueryOracle | nn.Module, x: Tensor, y: Tensor, target: Tensor | None, index: Tensor | None
    ) -> Tensor:
        if not isinstance(oracle, QueryOracle):
            oracle = QueryOracle(oracle, len(x), chunk=max(1, len(x)))
        seed = self.seed
        if index is None:
            seed, index = int(torch.randint(2**62, ())), torch.arange(len(x), device=x.device)
        with attacking(*oracle.models), torch.no_grad():
            x = x.detach().clone()
            oracle.queries, oracle.nonfinite = oracle.queries.clone(), oracle.nonfinite.clone()
            oracle.index, oracle.seed, oracle.direct = index, seed, len(x) <= oracle.chunk
            attack = self.adapted(False)  # in training a draw a step is enough: the next batch sees others
            search = Search(attack, oracle, x, y, target, index, watch=False)
            search.seed = seed
            state = attack.start(search, torch.arange(len(x), device=x.device))
            while int(state.t.min()) < self.steps if len(state) else False:
                state = attack.step(search, state)
                state.t = state.t + (~state.inside).long()
        return state.x.detach()


@contextmanager
def attacking(*models: nn.Module) -> Iterator[bool]:
    """Eval mode (restored), no inference mode, no float16 autocast, in which small gradients vanish; bf16 stays.

    Yields whether the model was in training mode.
    """
    kind = next((p.device.type for p in models[0].parameters()), "cpu")
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    with (
        evaluating(*models) as was_training,
        torch.inference_mode(False),
        torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not half),
    ):
        yield was_training


def check_images(
    x: Tensor, threat: ThreatModel, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Refuse what is not a batch of images in the box, naming the remedy.

    Raises:
        TypeError: not a floating-point tensor. ValueError: wrong rank, device, NaN, or values outside the box.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"images must be a floating-point tensor in {list(threat.box)}, got {kind}: divide uint8 by 255"
        )
    if x.dim() != 4:
        raise ValueError(f"images must be (B, C, H, W), got shape {tuple(x.shape)}")
    if device is not None and x.device.type != device.type:
        raise ValueError(f"images are on {x.device} and the model on {device}: move one to the other")
    if {x.dtype, dtype} == {torch.float32, torch.float64}:
        raise ValueError(f"images are {x.dtype} and the model's weights {dtype}: cast one to the other")
    if not len(x):
        return
    least, most = (float(end) for end in torch.aminmax(x.detach()))  # in one pass; NaN if any is
    if not (isfinite(least) and isfinite(most)):
        lost = int((~x.isfinite()).flatten(1).any(1).sum())
        raise ValueError(f"{lost} of {len(x)} images hold NaN or inf: leave them out or mend what makes them")
    low, high = threat.box
    if least < low or most > high:
        raise ValueError(
            f"images must lie in [{low:g}, {high:g}], got values in [{least:.3g}, {most:.3g}]: put the "
            "normalisation inside the model, and divide 8-bit images by 255"
        )


def check_rows(x: Tensor, oracle: QueryOracle, index: Tensor | None) -> None:
    """Refuse a ledger or places of another number of images.

    Raises:
        ValueError: not one entry per image.
    """
    if index is not None and index.shape != (len(x),):
        raise ValueError(f"index must hold one place per image, shape ({len(x)},), got {tuple(index.shape)}")
    if len(oracle.queries) != len(x):
        raise ValueError(f"the oracle has a ledger of {len(oracle.queries)} rows, but there are {len(x)} images")


def check_threat(threat: ThreatModel) -> None:
    """Refuse a bare radius.

    Raises:
        TypeError: not a threat model.
    """
    if not isinstance(threat, ThreatModel):
        raise TypeError(f"threat must be a ThreatModel, e.g. ThreatModel('linf', '8/255'), got {threat!r}")


def check_labels(y: Tensor, target: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Labels and targets as int64 on the images' device.

    Raises:
        ValueError: not one non-negative whole number per image, or a target that is the label.
    """
    labels = _classes("y", y, x)
    targets = None if target is None else _classes("target", target, x)
    if targets is not None and bool((labels == targets).any()):
        place = int((labels == targets).nonzero()[0])
        raise ValueError(f"target equals the label {int(labels[place])} of image {place}: choose another class")
    return labels, targets


def _classes(name: str, value: Tensor, x: Tensor) -> Tensor:
    if value.shape != (len(x),) or value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(
            f"{name} must hold one class index per image, shape ({len(x)},) of integers, "
            f"got shape {tuple(value.shape)} of {value.dtype}"
        )
    if len(value) and int(value.min()) < 0:
        raise ValueError(f"{name} holds the negative class {int(value.min())}: give class indices from 0")
    return value.to(x.device, torch.int64).clone()
