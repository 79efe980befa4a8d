"""GenAttack: a small population of perturbations that is selected, crossed and mutated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.draws import Draws
from lit_adv.losses import Loss, margin
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel


@dataclass(kw_only=True)
class GenAttackState(State):
    """Adds the population (P members, the elite first) and what is known of it.

    Attributes:
        members: (n, P, C, h, w) perturbations, before the ball. asked: (n,) members of this generation asked so far.
        fitness: (n, P) float64, NaN where not known. lead: (n, P) float64, how far the wanted class is behind, <= 0.
        nearest: (n,) float64, the best lead so far. stale: (n,) generations since. plateaus: (n,) how often too many.
    """

    members: Tensor
    asked: Tensor
    fitness: Tensor
    lead: Tensor
    nearest: Tensor
    stale: Tensor
    plateaus: Tensor


def log_odds(scores: Tensor, y: Tensor, target: Tensor | None = None, reject: int | None = None) -> Tensor:
    """log p of the target less log of all other mass; without a target, minus this for the true class (or refusal).

    Shape: scores (n, [s,] K) -> (n, [s]).
    """
    place = (y if target is None else target).view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1)
    if target is None and reject is not None:
        place = torch.cat([place, torch.full_like(place, reject)], -1)
    own = scores.gather(-1, place)
    own = own.squeeze(-1) if place.shape[-1] == 1 else own.logsumexp(-1)
    odds = own - scores.scatter(-1, place, -torch.inf).logsumexp(-1)
    return odds if target is not None else -odds


class GenAttack(IterativeAttack):
    """Each generation keeps its fittest member and replaces the others by mutated children of members drawn by fitness.

    A child takes each value from the first parent with probability p1 / (p1 + p2), the parents' shares in the draw;
    then each value is changed, with probability ``mutation_rate``, by a uniform number within ``alpha eps``. The elite
    is not asked about again: a generation costs ``population - 1`` queries, the first one more.

    Departures from the released code: no targets are needed (the code is targeted only; without one the mass of the
    true class plays the part of "all others"); every member is a candidate when it is asked about; the logarithms have
    no floor of 1e-30.

    Args:
        threat: linf, radius and box. Perturbations wander freely, images are cut to ball and box, as in the release.
        steps: most generations.
        population: members of a generation, at least 2.
        mutation_rate: share of the values that mutate (rho), in (0, 1].
        alpha: largest mutation, in units of eps.
        temperature: of the softmax over fitness from which parents are drawn.
        adaptive: mutate all values in the first ten generations, then widely, and less so after every plateau (100
            generations without progress, 300 while the wanted class is 0.4 or more behind).
        latent: largest side of the perturbation, up-sampled bilinearly to the image; None for the image's own.
        init: the first members: ``uniform`` in the ball, as in algorithm 1, or the clean image ``mutated``, as in the
            released code.
        loss: fitness of a member.
        block: most members per image in one forward.
        stop_at_hit: False runs all generations.
        seed: of populations, parents and mutations.

    Raises:
        ValueError: an argument out of its range, or a norm without a rule.
    References:
        Alzantot et al. 2019, https://arxiv.org/abs/1805.11090, algorithms 1 and 2, and their released code, whose
        commands give: CIFAR-10 rate 0.05, alpha 0.25; MNIST 0.3 and 0.5; ImageNet adaptive, 0.1 and 0.15, latent 96.
    """

    access = Access.PROBS
    needs_whole_step = False
    looks_first = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("linf", 0.05),  # noqa: B008 - frozen
        steps: int = 10000,
        population: int = 4,
        mutation_rate: float = 0.05,
        alpha: float = 0.25,
        temperature: float = 0.1,
        adaptive: bool = False,
        latent: int | None = None,
        init: Literal["uniform", "mutated"] = "uniform",
        loss: Loss = log_odds,
        block: int = 32,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm != "linf" or threat.radius == math.inf:
            raise ValueError(
                f"GenAttack has rules for linf with a finite eps, got norm {threat.norm!r} and eps {threat.eps!r}"
            )
        if steps < 1 or block < 1 or (latent is not None and latent < 1):
            raise ValueError(f"steps, block and latent must be at least 1, got {steps}, {block} and {latent}")
        if population < 2:
            raise ValueError(f"population must be at least 2, the elite and a child, got {population}")
        if not 0 < mutation_rate <= 1:
            raise ValueError(f"mutation_rate must be a share of the values in (0, 1], e.g. 0.05, got {mutation_rate}")
        if not 0 < alpha < math.inf or not 0 < temperature < math.inf:
            raise ValueError(f"alpha and temperature must be positive, e.g. 0.25 and 0.1, got {alpha}, {temperature}")
        self.threat, self.steps, self.population, self.mutation_rate = threat, steps, population, mutation_rate
        self.alpha, self.temperature, self.adaptive, self.latent = alpha, temperature, adaptive, latent
        if init not in ("uniform", "mutated"):
            raise ValueError(f"init must be uniform or mutated, got {init!r}")
        self.init = init
        self.loss, self.block, self.stop_at_hit, self.seed = loss, block, stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        if not isinstance(state, GenAttackState):
            return min(self.block, self.population - 1)
        return (self.population - state.asked).clamp_max(self.block)

    def start(self, search: Search, rows: Tensor) -> GenAttackState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        size = [side if self.latent is None else min(side, self.latent) for side in x0.shape[2:]]
        uniform = search.starting_draws(rows).uniform(self.population, x0.shape[1], *size, dtype=x0.dtype)
        rate = torch.full((len(rows),), self.mutation_rate, device=x0.device)
        members = uniform.mul_(2).sub_(1) if self.init == "uniform" else mutations(uniform, rate)
        unknown = torch.full((len(rows), self.population), torch.nan, dtype=torch.float64, device=x0.device)
        state = GenAttackState(
            **fields,
            members=members.mul_(self.threat.radius),
            asked=torch.zeros_like(rows),
            fitness=unknown,
            lead=unknown.clone(),
            nearest=torch.full((len(rows),), -1.0, dtype=torch.float64, device=x0.device),
            stale=torch.zeros_like(rows),
            plateaus=torch.zeros_like(rows),
        )
        state.x = self._images(state.members[:, 0], x0)
        return state

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, GenAttackState)
        numbers = state.asked[:, None] + torch.arange(min(self.block, self.population), device=state.x.device)
        asked = (numbers < self.population) & ~search.won(state)[:, None]
        rows, columns = asked.nonzero().unbind(1)
        member = numbers[rows, columns]
        noise = state.members.flatten(0, 1).index_select(0, rows * self.population + member)
        images = self._images(noise, state.x0.index_select(0, rows))
        scores = search.scores(images, state, asked=asked)
        fitness = self.loss(scores, state.y, state.target, search.reject).double()
        state.fitness[rows, member] = fitness[rows, columns]
        if self.adaptive:
            lead = margin(scores.softmax(-1), state.y, state.target, search.reject).double().clamp_max(0)
            state.lead[rows, member] = lead[rows, columns]
        state.asked = numbers[:, -1] + 1
        state.inside = state.asked < self.population
        if not state.inside.all():
            self._succeed(search, state, (~state.inside).nonzero().squeeze(1))
        return state

    def _succeed(self, search: Search, state: GenAttackState, rows: Tensor) -> None:
        """Put the next generation in the place of one of which all is known."""
        fitness = state.fitness[rows]
        known = ~fitness.isnan()
        fitness = torch.where(known, fitness, -torch.inf).clamp(-1e30, 1e30)
        elite = fitness.argmax(1)
        if self.adaptive:
            self._notice_plateaus(state, rows)
        members = self._children(search.draws(state)[rows], state, rows, fitness, elite)
        state.members = members if len(rows) == len(state) else state.members.index_copy(0, rows, members)
        best, lead = (value[rows, elite] for value in (state.fitness, state.lead))
        state.fitness[rows], state.lead[rows] = torch.nan, torch.nan
        state.fitness[rows, 0], state.lead[rows, 0] = best, lead
        other = (elite > 0).nonzero().squeeze(1)  # elsewhere the elite is that of before
        state.x[rows[other]] = self._images(members[other, 0], state.x0[rows[other]])
        state.asked[rows] = 1
        over = ~known.any(1) | (state.t[rows] + 1 >= self.steps)  # useless answers; or the elite has been asked about
        state.done = state.done.index_put((rows,), state.done[rows] | over)

    def _children(self, draws: Draws, state: GenAttackState, rows: Tensor, fitness: Tensor, elite: Tensor) -> Tensor:
        """The elite and mutated children of parents drawn by fitness: (m, P, C, h, w)."""
        shape = state.members.shape[2:]
        share = (fitness / self.temperature).softmax(1)
        pick = draws.uniform(1, 2 * (self.population - 1), dtype=torch.float64)[:, 0]
        parents = torch.searchsorted(share.cumsum(1), pick).clamp_max(self.population - 1)
        chance = share.gather(1, parents).clamp_min(1e-300).view(len(rows), 2, -1)
        chance = (chance[:, 1] / chance.sum(1)).to(state.members.dtype)  # of the second parent's values
        uniform = draws.uniform(self.population - 1, *shape, dtype=state.members.dtype)
        flat, place = state.members.flatten(0, 1), rows[:, None] * self.population
        first, second = (
            flat.index_select(0, (place + part).view(-1)).view_as(uniform) for part in parents.chunk(2, dim=1)
        )
        rate, reach = self._strength(state, rows)
        mutation = mutations(fresh(uniform), rate)
        members = torch.empty_like(state.members) if len(rows) == len(state) else state.members[rows]
        children = members[:, 1:]
        torch.lerp(second, first, uniform.gt_(chance[..., None, None, None]), out=children)
        children.addcmul_(mutation, _to_all(reach, mutation))
        torch.index_select(flat, 0, place.squeeze(1) + elite, out=members[:, 0])
        return members

    def _strength(self, state: GenAttackState, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's rate and largest size of mutations."""
        shrunk = 0.9 ** state.plateaus[rows].double()
        if not self.adaptive:
            return torch.full_like(shrunk, self.mutation_rate), torch.full_like(shrunk, self.alpha * self.threat.radius)
        rate = torch.where(state.t[rows] < 10, 1.0, (0.5 * shrunk).clamp_min(self.mutation_rate))
        return rate, (0.4 * shrunk).clamp_min(self.alpha) * self.threat.radius

    def _notice_plateaus(self, state: GenAttackState, rows: Tensor) -> None:
        lead = state.lead[rows].nan_to_num(-1.0).amax(1)
        nearer = lead > state.nearest[rows]
        stale = torch.where(nearer, 0, state.stale[rows] + 1)
        over = stale > torch.where(lead > -0.4, 100, 300)
        state.nearest[rows] = torch.maximum(lead, state.nearest[rows])
        state.stale[rows] = torch.where(over, 0, stale)
        state.plateaus[rows] += over.long()

    def _images(self, noise: Tensor, x0: Tensor) -> Tensor:
        """Images of perturbations, cut to ball and box: both (m, C, ., .)."""
        if noise.shape[2:] != x0.shape[2:]:
            noise = F.interpolate(noise, x0.shape[2:], mode="bilinear", align_corners=False)
        radius = self.threat.radius
        return noise.clamp(-radius, radius).add_(x0).clamp_(*self.threat.box)


def fresh(uniform: Tensor) -> Tensor:
    """Further uniform numbers: the digits of the given ones behind the first eight bits."""
    return uniform.mul(256).frac_()


def mutations(uniform: Tensor, rate: Tensor) -> Tensor:
    """Numbers uniform in (-1, 1) for a share of the values, 0 for the others, from numbers uniform in (0, 1).

    Below ``rate`` a uniform number is, stretched, a uniform number again, so one draw decides whether and how much.

    Shape: uniform (m, s, C, h, w), overwritten; rate (m,).
    """
    return F.threshold(uniform.mul_(_to_all(-2 / rate, uniform)).add_(1), -1.0, 0.0, inplace=True)


def _to_all(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)[:, None, None, None, None]
