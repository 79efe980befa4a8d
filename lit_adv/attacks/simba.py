"""SimBA: one step along a random vector of an orthonormal basis after another, each kept if it helps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.draws import Draws
from lit_adv.losses import Loss, cross_entropy
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel


@dataclass(kw_only=True)
class SimBAState(State):
    """Adds what is remembered of the search.

    Attributes:
        delta: (n, C, H, W) the sum of the steps taken, before ball and box. taken: (n,) how many they are.
        order: (n, D) int32, the basis vectors in the order of their turn.
        sign: (n,) of the step to be asked about; 0 while the clean image has not been asked about.
        best: (n,) float64, the loss of the current image, never asked for again.
    """

    delta: Tensor
    taken: Tensor
    order: Tensor
    sign: Tensor
    best: Tensor


class SimBA(IterativeAttack):
    """Picks basis vectors q at random without replacement and takes the step +eps q if it raises the loss, else -eps q.

    The minus is asked about only where the plus has not helped, so a vector costs one query or two; the clean image
    costs one. All steps are orthogonal: k of them move the image by ``step_size sqrt(k)`` in l2.

    Departures: images are asked about inside the ball of the threat model, to which the sum of the steps is projected
    (the paper has no ball: ``eps: inf``; the release can clip to a box in linf); +eps comes first, as in the paper
    (in the release -eps); each image has its own order (the release shares one).

    Args:
        threat: norm (linf, l2), radius and box.
        steps: most basis vectors tried; the attack also ends with the last vector of the basis.
        step_size: length of a step in l2, pixel units; in the pixel basis the change of one pixel.
        basis: ``pixel``: single values of the image. ``dct``: cosines of one channel.
        frequencies: ``dct``: the lowest frequencies per axis come first; None: all in one random order.
        stride: ``dct``: further frequencies per axis, band by band, once those before are used up; 0 for none.
        loss: what is raised. The default orders images as the paper does, by the probability of the true class or of
            the target.
        stop_at_hit: False runs all steps.
        seed: of the order.

    Raises:
        ValueError: an argument out of its range, or a norm without a rule.
    References:
        Guo et al. 2019, https://arxiv.org/abs/1905.07121, algorithm 1 and section 3: step 0.2; low frequencies
        28 of 224 with stride 7 for ImageNet, pixels for CIFAR-10.
    """

    access = Access.PROBS
    needs_whole_step = False

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("l2", "inf"),  # noqa: B008 - frozen
        steps: int = 10000,
        step_size: float = 0.2,
        basis: Literal["pixel", "dct"] = "pixel",
        frequencies: int | None = None,
        stride: int = 7,
        loss: Loss = cross_entropy,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm not in ("linf", "l2"):
            raise ValueError(f"SimBA has rules for linf and l2, got norm {threat.norm!r}: choose one of them")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not 0 < step_size < math.inf:
            raise ValueError(f"step_size must be a positive length in pixel units, e.g. 0.2, got {step_size}")
        if basis not in ("pixel", "dct"):
            raise ValueError(f"basis must be pixel or dct, got {basis!r}")
        if frequencies is not None and (frequencies < 1 or basis == "pixel"):
            raise ValueError(
                f"frequencies must be at least 1 or None, and are those of the dct basis, got {frequencies} in {basis}"
            )
        if stride < 0:
            raise ValueError(f"stride must be >= 0 frequencies, 0 for no more than the first ones, got {stride}")
        self.threat, self.steps, self.step_size = threat, steps, step_size
        self.basis, self.frequencies, self.stride = basis, frequencies, stride
        self.loss, self.stop_at_hit, self.seed = loss, stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return 1

    def start(self, search: Search, rows: Tensor) -> SimBAState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        fields["x"] = x0.clone()  # changed in place
        return SimBAState(
            **fields,
            delta=torch.zeros_like(x0),
            taken=torch.zeros_like(rows),
            order=self.order(search.starting_draws(rows), x0.shape[1:]).int(),
            sign=x0.new_zeros(len(x0)),
            best=torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=x0.device),
        )

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, SimBAState)
        delta = self._stepped(state)
        proposal = self._image(delta, state)
        scores = search.scores(proposal, state)
        value = self.loss(scores, state.y, state.target, search.reject).double()
        better = value > state.best  # False for NaN
        state.best = torch.where(better, value, state.best)
        first, plus = state.sign == 0, state.sign > 0
        kept = (better & ~first).nonzero().squeeze(1)
        state.delta.index_copy_(0, kept, delta[kept])
        state.x.index_copy_(0, kept, proposal[kept])
        state.taken = state.taken + (better & ~first)
        turned = plus & ~better
        state.inside = first | turned
        state.sign = torch.where(turned, -1.0, 1.0).to(state.sign)
        last = min(self.steps, state.order.shape[1])
        state.done = state.done | (~state.inside & (state.t + 1 >= last))  # what is left has been asked about
        return state

    def order(self, draws: Draws, shape: torch.Size) -> Tensor:
        """A random order of the basis vectors for each row: places in (C, H, W), (n, D) int64."""
        places, bands = _bands(tuple(shape), self.frequencies, self.stride)
        if not bands.any():
            return places.to(draws.index.device)[draws.permutation(len(places))]
        keys = draws.uniform(1, len(places), dtype=torch.float64)[:, 0] + bands.to(draws.index.device)
        return places.to(keys.device)[keys.argsort(dim=1, stable=True)]

    def _stepped(self, state: SimBAState) -> Tensor:
        """The sum of the steps with the one in question, by one outer product."""
        channels, height, width = state.x.shape[1:]
        turn = state.t.clamp_max(state.order.shape[1] - 1)
        place = state.order.gather(1, turn[:, None]).squeeze(1).long()
        down, across = (_vectors(self.basis, size).to(state.delta) for size in (height, width))
        channel = torch.arange(channels, device=place.device) == place[:, None] // (height * width)
        amount = channel * (self.step_size * state.sign * ~state.done)[:, None]
        lines = amount[:, :, None, None] * down[place // width % height][:, None, :, None]
        return torch.addcmul(state.delta, lines, across[place % width][:, None, None, :])

    def _image(self, delta: Tensor, state: SimBAState) -> Tensor:
        """The sum of steps projected into ball and box. Its l2 norm is known, for the steps are orthonormal."""
        if self.threat.norm == "linf":
            moved = delta.clamp(-self.threat.radius, self.threat.radius).add_(state.x0)
        else:
            length = (state.taken + state.sign.abs()).sqrt() * self.step_size
            scale = (self.threat.radius / length.clamp_min(1e-12)).clamp_max(1)
            moved = torch.addcmul(state.x0, delta, scale.to(delta)[:, None, None, None])
        return moved.clamp_(*self.threat.box)


@lru_cache(maxsize=32)
def _vectors(basis: str, size: int) -> Tensor:
    """An orthonormal basis of one axis, a vector a row: float64 (size, size)."""
    if basis == "pixel":
        return torch.eye(size, dtype=torch.float64)
    number = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi / size * number[:, None] * (number + 0.5))  # type-II
    cosines[0] /= math.sqrt(2)
    return cosines * math.sqrt(2 / size)


@lru_cache(maxsize=32)
def _bands(shape: tuple[int, int, int], frequencies: int | None, stride: int) -> tuple[Tensor, Tensor]:
    """Places of the basis vectors in use, (D,), and the band of each, counted from 0 for those that come first."""
    _, height, width = shape
    highest = torch.maximum(torch.arange(height)[:, None], torch.arange(width)).expand(shape).flatten()
    beyond = highest - (highest if frequencies is None else frequencies - 1)
    places = (beyond <= (0 if stride == 0 else max(shape))).nonzero().squeeze(1)
    return places, beyond[places].clamp_min(0).add(max(stride, 1) - 1).div(max(stride, 1), rounding_mode="floor")
