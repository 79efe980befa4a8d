"""Particle swarm: points of the ball that fly on, drawn to the best place each has seen and to the best of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.blocks import Blocks
from lit_adv.losses import Loss, is_adversarial, margin
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel


@dataclass(kw_only=True)
class PSOState(State):
    """Adds the swarm (S particles); ``x`` is the best place that it has seen.

    Attributes:
        places, velocities, own: (n, S, C, H, W); ``own`` is the best place of each particle.
        values: (n, S) float64, the loss there. best: (n,) float64, the loss at ``x``.
        phase: (n,) blocks asked of this iteration. begun: (n,) bool, all particles have been asked about once.
    """

    places: Tensor
    velocities: Tensor
    own: Tensor
    values: Tensor
    best: Tensor
    phase: Tensor
    begun: Tensor


def signed_probability(scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """The largest probability, negative while the attacker has not won: the objective printed in the paper.

    Shape: scores (n, [s,] K) -> (n, [s]).
    """
    surest, label = scores.softmax(-1).max(-1)
    return torch.where(is_adversarial(label, y, target, reject), surest, -surest)


class PSO(IterativeAttack):
    """A swarm of images in ball and box: v <- w v + a r (own best - x) + b s (swarm's best - x), x <- x + v.

    r and s are uniform numbers of their own for every value. An image ends when the swarm's best improves by less than
    ``tolerance``, in loss or place. At most ``particles (1 + steps)`` queries.

    Departures: the swarm's best is looked up after each iteration (in the library that the paper used, after each
    particle); the default loss is the margin (the paper's code, by a slip, uses log p of the true class; its printed
    objective is ``lit_adv.attacks.pso.signed_probability``); each particle is a candidate when it is asked about.

    The state of an image holds three images per particle: some 1 MB for a swarm of 100 on MNIST, 3.7 MB on CIFAR-10.

    Args:
        threat: linf, radius and box; ``eps: inf`` searches the box.
        steps: most iterations after the first look at the swarm.
        particles: of a swarm.
        inertia: w. own: a, the pull of a particle's own best place. swarm: b, that of the swarm's.
        tolerance: improvement, in loss or in l2 distance, at or below which the search ends.
        loss: what is raised.
        block: most particles per image in one forward.
        stop_at_hit: False runs on until another rule ends the search.
        seed: of swarm and pulls.

    Raises:
        ValueError: an argument out of its range, or a norm without a rule.
    References:
        Kennedy & Eberhart 1995, https://doi.org/10.1109/ICNN.1995.488968; as an attack: Bhagoji et al. 2018,
        https://arxiv.org/abs/1712.09491, section 3.2 and table 2: swarm 100, 100 iterations, weights 0.5.
    """

    access = Access.PROBS
    needs_whole_step = False
    looks_first = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("linf", 0.3),  # noqa: B008 - frozen
        steps: int = 100,
        particles: int = 100,
        inertia: float = 0.5,
        own: float = 0.5,
        swarm: float = 0.5,
        tolerance: float = 1e-8,
        loss: Loss = margin,
        block: int = 32,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm != "linf":
            raise ValueError(f"PSO has a rule for linf, whose ball is a box of bounds, got norm {threat.norm!r}")
        if steps < 1 or particles < 1 or block < 1:
            raise ValueError(f"steps, particles and block must be at least 1, got {steps}, {particles} and {block}")
        if not (inertia >= 0 and own >= 0 and swarm >= 0):
            raise ValueError(f"inertia, own and swarm must be weights >= 0, got {inertia}, {own} and {swarm}")
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be >= 0, got {tolerance}")
        self.threat, self.steps, self.particles = threat, steps, particles
        self.inertia, self.own, self.swarm, self.tolerance = inertia, own, swarm, tolerance
        self.loss, self.block, self.stop_at_hit, self.seed = loss, block, stop_at_hit, seed
        self._blocks = Blocks(particles, block)

    def cost(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        if not isinstance(state, PSOState):
            return self._blocks.size
        return (self.particles - state.phase * self._blocks.size).clamp_max(self._blocks.size)

    def start(self, search: Search, rows: Tensor) -> PSOState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        lower, upper = self._bounds(x0)
        width, size = upper - lower, self._blocks.count * self._blocks.size
        places, velocities = search.starting_draws(rows).uniform(size, 2, *x0.shape[1:], dtype=x0.dtype).unbind(2)
        places = torch.addcmul(lower, places, width)
        values = torch.full((len(rows), size), -torch.inf, dtype=torch.float64, device=x0.device)
        fields["x"] = x0.clone()  # changed in place
        fields["inside"] = torch.ones_like(fields["inside"])
        return PSOState(
            **fields,
            places=places,
            velocities=(2 * velocities).sub_(1).mul_(width),
            own=places.clone(),
            values=values,
            best=values[:, 0].clone(),
            phase=torch.zeros_like(rows),
            begun=torch.zeros_like(fields["done"]),
        )

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, PSOState)
        numbers = self._blocks.numbers(state.phase)
        asked = (numbers < self.particles) & ~search.won(state)[:, None]
        flying = state.begun.nonzero().squeeze(1)
        if len(flying):
            self._fly(search, state, flying, numbers[flying])
        chosen = torch.arange(len(state), device=numbers.device)[:, None] * state.values.shape[1] + numbers
        places = state.places.flatten(0, 1).index_select(0, chosen[asked])
        scores = search.scores(places, state, asked=asked)
        value = self.loss(scores, state.y, state.target, search.reject).double()
        value = torch.where(asked, value, torch.nan)
        better = value > state.values.gather(1, numbers)  # False for NaN
        state.values.view(-1).index_copy_(0, chosen[better], value[better])
        state.own.flatten(0, 1).index_copy_(0, chosen[better], places[better[asked]])
        state.phase = state.phase + 1
        complete = (state.phase == self._blocks.count).nonzero().squeeze(1)
        state.inside = torch.ones_like(state.inside)
        if len(complete):
            self._gather(state, complete)
        return state

    def _fly(self, search: Search, state: PSOState, rows: Tensor, numbers: Tensor) -> None:
        """Move a block of particles of each of the rows."""
        chosen = (rows[:, None] * state.values.shape[1] + numbers).view(-1)
        shape = (*numbers.shape, *state.x.shape[1:])

        def particles(of: Tensor) -> Tensor:
            return of.flatten(0, 1).index_select(0, chosen).view(shape)

        places, velocities = particles(state.places), particles(state.velocities)
        pulls = search.draws(state)[rows].uniform(shape[1], 2, *shape[2:], first=numbers[:, 0], dtype=places.dtype)
        velocities.mul_(self.inertia)
        velocities.addcmul_(pulls[:, :, 0], particles(state.own).sub_(places), value=self.own)
        velocities.addcmul_(pulls[:, :, 1], state.x[rows].unsqueeze(1) - places, value=self.swarm)
        lower, upper = self._bounds(state.x0[rows])
        places = torch.clamp(places.add_(velocities), lower, upper)
        state.places.flatten(0, 1).index_copy_(0, chosen, places.flatten(0, 1))
        state.velocities.flatten(0, 1).index_copy_(0, chosen, velocities.flatten(0, 1))

    def _gather(self, state: PSOState, rows: Tensor) -> None:
        """End the iteration of rows whose particles have all been asked about."""
        value, place = state.values[rows].max(1)
        found, begun = state.own[rows, place], state.begun[rows]
        better = value > state.best[rows]
        near = (found - state.x[rows]).flatten(1).norm(dim=1) <= self.tolerance
        little = (value - state.best[rows] <= self.tolerance) | near
        state.x[rows] = torch.where(better[:, None, None, None], found, state.x[rows])
        state.best[rows] = torch.where(better, value, state.best[rows])
        state.phase[rows], state.begun[rows] = 0, True
        state.inside[rows] = ~begun
        last = begun & (state.t[rows] + 1 >= self.steps)  # what is left has been asked about
        useless = value == -torch.inf
        state.done = state.done.index_put((rows,), state.done[rows] | (begun & better & little) | last | useless)

    def _bounds(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The ball cut by the box: both (n, 1, C, H, W)."""
        (low, high), radius = self.threat.box, self.threat.radius
        return (x0 - radius).clamp_min_(low).unsqueeze(1), (x0 + radius).clamp_max_(high).unsqueeze(1)
