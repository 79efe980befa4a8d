"""NAttack: a Gaussian over perturbations whose mean follows the natural evolution strategy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.answers import dtype_of, evaluating
from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.blocks import Blocks
from lit_adv.losses import Loss, hinge, is_adversarial
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel, norm_of

_LONG = 50  # populations with equal rewards in a row after which a user is warned
_NO_UPPER = 1e10


@dataclass(kw_only=True)
class NAttackState(State):
    """Adds the mean, the image in the space searched, and what the blocks of the population so far have left.

    Attributes:
        phi: (n, C, h, w) mean of the search distribution. origin: (n, C, H, W) the clean image in the space searched.
        phase: (n,) blocks asked of this population. rewards: (n, blocks, size) float64, NaN where not (yet) known.
        shift: (n,) float64 subtracted from rewards before they are summed, for precision.
        sums: (n, 2, C, h, w) of the draws, and of the draws each times its shifted reward.
        shared: (n,) float64, the score that a released loss compares with. equal: (n,) populations in a row whose
            rewards were all equal.
        constant: (n, 3) float64, the weight of the loss beside the distance and its bounds. met: (n,) whether this
            weight has made an image adversarial.
    """

    phi: Tensor
    origin: Tensor
    phase: Tensor
    rewards: Tensor
    shift: Tensor
    sums: Tensor
    shared: Tensor
    equal: Tensor
    constant: Tensor
    met: Tensor


class NAttack(IterativeAttack):
    """Black-box search for the mean of a Gaussian whose samples are adversarial.

    Each step draws a population around the mean in arctanh space, clips every sample into the threat model's ball,
    and moves the mean along the z-scored rewards. A population is asked in blocks, made when asked; every sample is
    a candidate, so an image ends in the block that breaks it.

    ``objective: distortion`` searches the nearest adversarial image (the paper's *NATTACK, for which eps is "inf" and
    so nothing clipped): the reward is ``constant * loss - distance``, the mean too is looked at every ``check_every``
    steps, and the nearest hit is kept. ``initial`` begins at what a regression network says of the image (NATTACK-R).
    The release runs a second attack on images that the first leaves unbroken: evaluate a further one with
    ``space: pixel`` beside it; the worst case per image of the two is the release's figure.

    Departures from the released code: the margin is taken per sample and from the scores (unless ``loss`` is
    ``"released"``); clipping is around the image itself; samples are candidates unless ``schedule`` is ``"mean"``;
    rewards that are all equal move nothing; an unfinished population is not used.

    Args:
        threat: norm (linf, l2), radius and box. l2 samples outside the ball are scaled back onto it, never out.
        steps: most updates of the mean, over all constants. samples: population of one update (N), at least 2.
        step_size: eta, in units of the latent space.
        sigma: standard deviation of the search distribution. init_std: of the mean at the start.
        shrink: share by which the image is drawn to mid-grey before arctanh. 1e-6 is the paper's and freezes black
            and white pixels; 0.1 lets MNIST move. Shifts the start by at most half of it.
        space: ``tanh`` searches in arctanh space, ``pixel`` in pixels (the release's second attack).
        latent: largest side of the latent, up-sampled bilinearly to the image.
        zscore: normalise each population's rewards; without it ``step_size`` must be far larger.
        antithetic: draw half of the population and its negatives.
        sign_step: move every coordinate by ``step_size`` along the sign of the estimate.
        schedule: ``samples``: every sample is a candidate. ``mean``: as released, the mean alone is tested, every
            ``check_every`` steps, after a first population of equal rewards, and at the end.
        check_every: steps between tests of the mean.
        loss: reward of a sample. ``released``: the log-probability of the true class (targeted: the target's), cut
            where it falls below that of the best other class in the population's first sample, which serves for all.
        objective: ``adversarial`` or ``distortion``.
        constant: weight of the loss beside the distance, the first one if several are tried; > 0.
        search_steps: constants tried, in equal shares of ``steps``: bisected after the first success, times 10
            before (Carlini & Wagner); each begins anew. More than 1 for ``distortion`` only.
        initial: a function or module from images (n, C, H, W) in the box to the means to begin with, (n, C, h, w) of
            the latent's size; runs in eval mode, and on the images' device.
        initial_scale: factor of what it says.
        block: most samples per image in one forward.
        stop_at_hit: False runs all steps.
        seed: of start and population.

    Raises:
        ValueError: an argument out of its range, a norm without a rule, or means of another shape than the latent.
    References:
        Li et al. 2019, https://arxiv.org/abs/1905.00441, algorithm 1, equations (1) to (6); hyper-parameters of its
        experiments: 600 steps, 300 samples, sigma^2 = 0.01, eta = 0.008; ``constant`` is not given there. Their
        released code has ``init_std``, ``latent``, ``schedule: mean`` with ``check_every`` 10, and the loss.
    """

    looks_first = True

    def __init__(
        self,
        threat: ThreatModel = ThreatModel("linf", 0.031),  # noqa: B008 - frozen
        steps: int = 600,
        samples: int = 300,
        step_size: float = 0.008,
        sigma: float = 0.1,
        init_std: float = 0.001,
        shrink: float = 1e-6,
        space: Literal["tanh", "pixel"] = "tanh",
        latent: int = 32,
        zscore: bool = True,
        antithetic: bool = False,
        sign_step: bool = False,
        schedule: Literal["samples", "mean"] = "samples",
        check_every: int = 10,
        loss: Literal["released"] | Loss = hinge,
        objective: Literal["adversarial", "distortion"] = "adversarial",
        constant: float = 1.0,
        search_steps: int = 1,
        initial: nn.Module | Callable[[Tensor], Tensor] | None = None,
        initial_scale: float = 1.0,
        block: int = 32,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        self.threat, self.steps, self.samples, self.step_size = threat, steps, samples, step_size
        self.sigma, self.init_std, self.shrink = sigma, init_std, shrink
        self.space, self.latent, self.zscore, self.antithetic = space, latent, zscore, antithetic
        self.sign_step, self.schedule, self.check_every = sign_step, schedule, check_every
        self.loss, self.objective, self.constant, self.search_steps = loss, objective, constant, search_steps
        self.initial, self.initial_scale = initial, initial_scale
        self.block, self.stop_at_hit, self.seed = block, stop_at_hit, seed
        _check(self)
        self.access = Access.PROBS
        self.minimizes_distance = objective == "distortion"
        self.needs_whole_step = schedule == "mean"
        self.models = [initial] if isinstance(initial, nn.Module) else []  # whose weights decide the result, too
        self._blocks = Blocks(samples, block, even=antithetic)
        self._tests_mean = schedule == "mean" or objective == "distortion"

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self._blocks.size + (self._tests_mean and state is not None)

    def least(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        if not self.needs_whole_step:
            return self.cost(shape, state)
        if not isinstance(state, NAttackState):
            return self.samples + 1
        return torch.where(state.phase == 0, self.samples + self._due(state).long(), 1)

    def start(self, search: Search, rows: Tensor) -> NAttackState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        phi, blocks = self._first_mean(search, rows, x0), self._blocks
        low, high = self.threat.box
        grey = 0.5 + (1 - self.shrink) * ((x0 - low) / (high - low) - 0.5)
        zero = torch.zeros(len(rows), dtype=torch.float64, device=x0.device)
        state = NAttackState(
            **fields,
            phi=phi,
            origin=grey.logit() if self.space == "tanh" else x0,  # logit = 2 arctanh of the pixel in (-1, 1)
            phase=torch.zeros_like(rows),
            rewards=zero.new_full((len(rows), blocks.count, blocks.size), torch.nan),
            shift=zero,
            sums=torch.zeros_like(phi).unsqueeze(1).repeat(1, 2, 1, 1, 1),
            shared=zero,
            equal=torch.zeros_like(rows),
            constant=torch.stack([zero + self.constant, zero, zero + _NO_UPPER], 1),
            met=torch.zeros_like(rows, dtype=torch.bool),
        )
        state.x = self.render(state).squeeze(1)
        return state

    def _first_mean(self, search: Search, rows: Tensor, x0: Tensor) -> Tensor:
        n, channels, height, width = x0.shape
        size = (channels, min(height, self.latent), min(width, self.latent))
        if self.initial is None:
            return search.starting_draws(rows).normal(*size, dtype=x0.dtype).mul_(self.init_std)
        if not n:
            return x0.new_zeros(0, *size)
        with evaluating(*self.models):
            phi = self.initial(x0.to(dtype_of(self.models[0].to(x0.device))) if self.models else x0)
        if not isinstance(phi, Tensor) or phi.shape != (n, *size):
            got = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
            name = type(self.initial).__name__
            raise ValueError(f"initial must return means of shape {(n, *size)} (see latent), {name} returned {got}")
        if not phi.isfinite().all():
            raise ValueError("initial returned NaN or inf: it is broken, or needs other images than these")
        return phi.to(x0.dtype) * self.initial_scale

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, NAttackState)
        if self._tests_mean:
            self._test_mean(search, state)
        won = search.won(state) if self.schedule == "mean" else None
        if won is not None and won.all():
            return state
        noise = self._population(search, state)
        images = self.render(state, noise)
        asked = self._asked(state, won)
        scores = search.scores(images, state, candidate=self.schedule == "samples", asked=asked)
        reward = self._reward(search, state, scores, images)
        if asked is not None:
            reward = reward.masked_fill(~asked, torch.nan)
        self._gather(state, noise, reward)
        complete = state.phase == self._blocks.count
        state.inside = ~complete
        if complete.any():
            self._update(search, state, complete)
        return state

    def render(self, state: NAttackState, noise: Tensor | None = None) -> Tensor:
        """Images of the means (n, 1, C, H, W), or of samples around them (n, s, C, H, W), in ball and box.

        Shape: noise (n, s, C, h, w), standard normal.
        """
        scale = 2.0 if self.space == "tanh" else 1.0  # tanh(w) = 2 sigmoid(2 w) - 1
        phi, origin = state.phi.unsqueeze(1), state.origin.unsqueeze(1)
        if phi.shape == origin.shape:
            image = torch.add(origin, phi, alpha=scale)
            image = image if noise is None else torch.add(image, noise, alpha=scale * self.sigma)
        else:
            latent = phi if noise is None else torch.add(phi, noise, alpha=self.sigma)
            grown = F.interpolate(latent.flatten(0, 1), origin.shape[-2:], mode="bilinear", align_corners=False)
            image = grown.mul_(scale).view(*latent.shape[:2], *origin.shape[2:]).add_(origin)
        if self.space == "tanh":
            image.sigmoid_()
            if self.threat.box != (0.0, 1.0):
                low, high = self.threat.box
                image.mul_(high - low).add_(low)
        return self.threat.project(image, state.x0)

    def _population(self, search: Search, state: NAttackState) -> Tensor:
        """The draws of each row's next block, (n, size, C, h, w)."""
        draws, dtype, size = search.draws(state), state.phi.dtype, self._blocks.size
        latent = state.phi.shape[1:]
        if not self.antithetic:
            return draws.normal(size, *latent, first=state.phase * size, dtype=dtype)
        half = draws.normal(size // 2, *latent, first=state.phase * (size // 2), dtype=dtype)
        return torch.stack([half, -half], 2).flatten(1, 2)  # pairs side by side: any even share of a block is paired

    def _asked(self, state: NAttackState, won: Tensor | None) -> Tensor | None:
        """Which samples there are to ask, (n, size); None: all of them. Rows whose mean has won ask no more."""
        blocks = self._blocks
        if blocks.size * blocks.count == blocks.total and (won is None or not won.any()):
            return None
        there = blocks.numbers(state.phase) < blocks.total
        return there if won is None else there & ~won[:, None]

    def _reward(self, search: Search, state: NAttackState, scores: Tensor, images: Tensor) -> Tensor:
        """What each sample is worth, (n, s) float64."""
        if callable(self.loss):
            reward = self.loss(scores, state.y, state.target, search.reject).double()
        else:
            reward = _released(scores, state, search.reject)
        if self.search_steps > 1:
            self._note_hits(search, state, scores)
        if self.objective == "distortion":
            distance = norm_of((images - state.x0.unsqueeze(1)).flatten(2), self.threat.norm)
            reward = state.constant[:, :1] * reward - distance
        return reward

    def _gather(self, state: NAttackState, noise: Tensor, reward: Tensor) -> None:
        """Add a block to the sums from which the update is made, so that no draw has to be kept."""
        if self._blocks.count == 1:
            state.rewards = reward.unsqueeze(1)
        else:
            place = state.phase.view(-1, 1, 1).expand(-1, 1, self._blocks.size)
            state.rewards.scatter_(1, place, reward.unsqueeze(1))
        first = reward[:, 0].nan_to_num(0.0, 0.0, 0.0)
        state.shift = torch.where(state.phase == 0, first, state.shift)
        centred = reward - state.shift[:, None]
        known = centred.abs() < torch.inf  # which NaN is not either
        weights = torch.stack([known, torch.where(known, centred, 0.0)], 1).to(noise.dtype)
        with torch.autocast(noise.device.type, enabled=False):
            state.sums.view(*weights.shape[:2], -1).baddbmm_(weights, noise.flatten(2))
        state.phase = state.phase + 1

    def _update(self, search: Search, state: NAttackState, complete: Tensor) -> None:
        """Move the mean of the rows whose population is complete, and begin the next one."""
        rewards = state.rewards.flatten(1)
        known = rewards.isfinite()
        count = known.sum(1).clamp_min(1)
        mean = torch.where(known, rewards, 0).sum(1) / count
        spread = torch.where(known, (rewards - mean[:, None]) ** 2, 0).sum(1).div(count).sqrt()
        flat = torch.where(known, rewards, -torch.inf).amax(1) == torch.where(known, rewards, torch.inf).amin(1)
        centre, scale = (mean - state.shift, 1 / (spread + 1e-7)) if self.zscore else (-state.shift, mean * 0 + 1)
        rate = torch.where(flat, 0.0, scale * self.step_size / (self.samples * self.sigma))
        move = _rows(rate, state.phi) * (state.sums[:, 1] - _rows(centre, state.phi) * state.sums[:, 0])
        if self.sign_step:
            move = self.step_size * move.sign()
        chosen = complete[:, None, None, None]
        state.phi = torch.where(chosen, state.phi + move, state.phi)
        state.done = state.done | (complete & (known.sum(1) * 2 < self.samples))  # the model's answers are useless
        state.sums = torch.where(chosen.unsqueeze(1), 0.0, state.sums)
        state.rewards = torch.where(complete[:, None, None], torch.nan, state.rewards)
        state.phase = torch.where(complete, 0, state.phase)
        self._note_equal(search, state, complete, flat)
        if self.search_steps > 1:
            self._next_constant(search, state, complete)
        state.x = torch.where(chosen, self.render(state).squeeze(1), state.x)

    def _note_equal(self, search: Search, state: NAttackState, complete: Tensor, flat: Tensor) -> None:
        """Count populations that tell nothing, and warn where they do not end."""
        state.equal = torch.where(complete, torch.where(flat, state.equal + 1, 0), state.equal)
        if not search.watch:
            return
        search.count("populations with equal rewards", flat[complete])
        if (complete & (state.equal == _LONG) & ~search.success[state.rows]).any():
            warnings.warn(
                f"the rewards of {_LONG} populations in a row were all equal, so the mean stays where it is: the model "
                "answers the same everywhere, or the loss saturates (choose lit_adv.losses.hinge or another margin)",
                stacklevel=2,
            )

    def _due(self, state: NAttackState) -> Tensor:
        """Whether the mean is to be tested now; also where all samples were alike, as when all have won."""
        if not self._tests_mean:
            return torch.zeros_like(state.done)
        return (state.phase == 0) & ((state.t % self.check_every == 0) | (state.equal == 1))

    def _test_mean(self, search: Search, state: NAttackState) -> None:
        due = self._due(state).nonzero().squeeze(1)
        if not len(due):
            return
        part = state[due]
        scores = search.scores(part.x, part, check=True)
        if self.search_steps > 1:
            self._note_hits(search, part, scores.unsqueeze(1))
            state.met[due] = part.met

    def _note_hits(self, search: Search, state: NAttackState, scores: Tensor) -> None:
        """Remember whether any of the images asked about, scores (n, s, K), was adversarial."""
        hit = is_adversarial(scores.argmax(-1), state.y, state.target, search.reject) & ~scores.isnan().any(-1)
        state.met = state.met | hit.any(1)

    def _next_constant(self, search: Search, state: NAttackState, complete: Tensor) -> None:
        """Where a constant has had its share of the steps, choose the next one and begin anew."""
        ended = (complete & ((state.t + 1) % -(-self.steps // self.search_steps) == 0)).nonzero().squeeze(1)
        if not len(ended):
            return
        met, (c, lower, upper) = state.met[ended], state.constant[ended].unbind(1)
        lower, upper = torch.where(met, lower, c), torch.where(met, c, upper)
        c = torch.where(upper < _NO_UPPER, (lower + upper) / 2, 10 * c)
        state.constant[ended] = torch.stack([c, lower, upper], 1)
        state.met[ended] = False
        state.phi[ended] = self._first_mean(search, state.rows[ended], state.x0[ended])


def _released(scores: Tensor, state: NAttackState, reject: int | None) -> Tensor:
    """Minus the release's loss: own log-probability over the best other one of the population's first sample."""
    scores = scores.log_softmax(-1).double()
    label = state.y if state.target is None else state.target
    place = label.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    if reject is not None and state.target is None:
        place = torch.cat([place, torch.full_like(place, reject)], -1)
    own, others = scores.gather(-1, place).amax(-1), scores.scatter(-1, place, -torch.inf).amax(-1)
    first = own.isfinite().int().argmax(1, keepdim=True)  # the first that answered
    state.shared = torch.where(state.phase == 0, others.gather(1, first).squeeze(1), state.shared)
    gap = own - state.shared[:, None]
    return -gap.clamp_min(0) if state.target is None else gap.clamp_max(0)


def _rows(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)[:, None, None, None]


def _check(attack: NAttack) -> None:
    check_threat(attack.threat)
    choices = {"space": ("tanh", "pixel"), "schedule": ("samples", "mean"), "objective": ("adversarial", "distortion")}
    for name, legal in choices.items():
        if getattr(attack, name) not in legal:
            raise ValueError(f"{name} must be {' or '.join(legal)}, got {getattr(attack, name)!r}")
    if attack.threat.norm not in ("linf", "l2"):
        raise ValueError(f"NAttack has rules for linf and l2, got norm {attack.threat.norm!r}: choose one of them")
    for name in ("steps", "block", "check_every", "latent", "search_steps"):
        if getattr(attack, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(attack, name)}")
    if attack.samples < 2 or (attack.antithetic and attack.samples % 2):
        even = "even where antithetic" if attack.samples >= 2 else "at least 2 (their rewards are compared)"
        raise ValueError(f"samples must be {even}, got {attack.samples}")
    for name in ("sigma", "constant"):
        if not getattr(attack, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(attack, name)}")
    if not 0 < attack.shrink < 1:
        raise ValueError(f"shrink must lie in (0, 1), got {attack.shrink}")
    if not attack.init_std >= 0:
        raise ValueError(f"init_std must be >= 0, got {attack.init_std}")
    if not callable(attack.loss) and attack.loss != "released":
        raise ValueError(f"loss must be a function or 'released', got {attack.loss!r}")
    if attack.search_steps > 1 and attack.objective != "distortion":
        raise ValueError(f"search_steps > 1 needs objective: distortion, got {attack.search_steps}: leave it at 1")
