"""NAttack: a Gaussian over perturbations whose mean follows the natural evolution strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.losses import Loss, hinge
from lit_adv.oracle import Access
from lit_adv.threat import ThreatModel


@dataclass(kw_only=True)
class NAttackState(State):
    """Adds the mean, the image in arctanh space, and what the blocks of the population so far have left.

    Attributes:
        phi: (n, C, h, w) mean of the search distribution. w0: (n, C, H, W) arctanh image, or the image itself.
        phase: (n,) blocks asked of this population. rewards: (n, N) float64, NaN where not (yet) known.
        shift: (n,) float64 subtracted from rewards before they are summed, for precision.
        noise: (n, C, h, w) sum of the draws. weighted: the same, each times its shifted reward.
    """

    phi: Tensor
    w0: Tensor
    phase: Tensor
    rewards: Tensor
    shift: Tensor
    noise: Tensor
    weighted: Tensor


class NAttack(IterativeAttack):
    """Black-box search for the mean of a Gaussian whose samples are adversarial.

    Each step draws a population around the mean in arctanh space, clips every sample into the threat model's ball,
    and moves the mean along the z-scored rewards. A population is asked in blocks, made when asked; every sample is
    a candidate, so an image ends in the block that breaks it.

    Departures from the released code: the margin is taken per sample and from the scores (there: from sample 0);
    clipping is around the image itself; samples are candidates unless ``schedule`` is ``"mean"``.

    Args:
        threat: norm (linf, l2), radius and box. l2 samples outside the ball are scaled back onto it, never out.
        steps: most updates of the mean.
        samples: population of one update (N), at least 2.
        step_size: eta, in units of the latent space.
        sigma: standard deviation of the search distribution.
        init_std: standard deviation of the mean at the start.
        shrink: share by which the image is drawn to mid-grey before arctanh. 1e-6 is the paper's and freezes black
            and white pixels; 0.1 lets MNIST move. Shifts the start by at most half of it.
        space: ``tanh`` searches in arctanh space, ``pixel`` in pixels (the release's second attack).
        latent: largest side of the latent, up-sampled bilinearly to the image.
        zscore: normalise each population's rewards; without it ``step_size`` must be far larger.
        antithetic: draw half of the population and its negatives.
        schedule: ``samples``: every sample is a candidate. ``mean``: as released, the mean alone is tested, every
            ``check_every`` steps and at the end.
        check_every: steps between tests of the mean.
        loss: reward of a sample.
        block: most samples per image in one forward.
        stop_at_hit: False runs all steps.
        seed: of start and population.

    Raises:
        ValueError: an argument out of its range, or a norm without a rule.
    References:
        Li et al. 2019, https://arxiv.org/abs/1905.00441, algorithm 1, equations (1) to (5); hyper-parameters of its
        experiments: 600 steps, 300 samples, sigma^2 = 0.01, eta = 0.008.
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
        schedule: Literal["samples", "mean"] = "samples",
        check_every: int = 10,
        loss: Loss = hinge,
        block: int = 32,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        _check(threat, steps, samples, sigma, shrink, antithetic, block, check_every, latent)
        if space not in ("tanh", "pixel") or schedule not in ("samples", "mean"):
            raise ValueError(f"space must be tanh or pixel, schedule samples or mean, got {space!r} and {schedule!r}")
        if init_std < 0:
            raise ValueError(f"init_std must be >= 0, got {init_std}")
        self.threat, self.steps, self.samples, self.step_size = threat, steps, samples, step_size
        self.sigma, self.init_std, self.shrink, self.space, self.latent = (
            sigma,
            init_std,
            shrink,
            space,
            latent,
        )
        self.zscore, self.antithetic, self.schedule, self.check_every = (
            zscore,
            antithetic,
            schedule,
            check_every,
        )
        self.loss, self.stop_at_hit, self.seed = loss, stop_at_hit, seed
        self.block = block
        self._block = -(-samples // -(-samples // block))  # blocks of nearly equal size
        self._block += self._block % 2 if antithetic else 0
        self._blocks = -(-samples // self._block)
        self.access = Access.PROBS
        self.needs_whole_step = schedule == "mean"

    def cost(self, shape: torch.Size, state: State | None = None) -> int:
        return self._block + (self.schedule == "mean" and state is not None)

    def start(self, search: Search, rows: Tensor) -> NAttackState:
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        n, channels, height, width = x0.shape
        size = (channels, min(height, self.latent), min(width, self.latent))
        phi = self.init_std * search.starting_draws(rows).normal(*size, dtype=x0.dtype)
        low, high = self.threat.box
        unit = (1 - self.shrink) * (2 * (x0 - low) / (high - low) - 1)
        state = NAttackState(
            **fields,
            phi=phi,
            w0=unit.atanh() if self.space == "tanh" else x0,
            phase=torch.zeros_like(rows),
            rewards=torch.full((n, self._blocks * self._block), torch.nan, dtype=torch.float64, device=x0.device),
            shift=torch.zeros(n, dtype=torch.float64, device=x0.device),
            noise=torch.zeros_like(phi),
            weighted=torch.zeros_like(phi),
        )
        state.x = self.render(phi.unsqueeze(1), state).squeeze(1)
        return state

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, NAttackState)
        if self.schedule == "mean":
            self._test_mean(search, state)
            if search.won(state).all():
                return state
        noise = self._population(search, state)
        number = state.phase[:, None] * self._block + torch.arange(self._block, device=noise.device)
        asked = (number < self.samples) & ~search.won(state)[:, None]
        images = self.render((self.sigma * noise).add_(state.phi.unsqueeze(1)), state)
        candidate = self.schedule == "samples"
        mask = None if self.samples % self._block == 0 and self.schedule == "samples" else asked
        scores = search.scores(images, state, candidate=candidate, asked=mask)
        reward = self.loss(scores, state.y, state.target, search.reject).double()
        self._gather(state, noise, reward, number, asked)
        complete = state.phase == self._blocks
        state.inside = ~complete
        if complete.any():
            self._update(state, complete)
        return state

    def render(self, phi: Tensor, state: NAttackState) -> Tensor:
        """Images of latents, clipped into ball and box: (n, s, C, h, w) -> (n, s, C, H, W)."""
        if phi.shape[-2:] != state.w0.shape[-2:]:
            n, samples = phi.shape[:2]
            grown = F.interpolate(phi.flatten(0, 1), state.w0.shape[-2:], mode="bilinear", align_corners=False)
            phi = grown.view(n, samples, *grown.shape[1:])
        image = state.w0.unsqueeze(1) + phi
        if self.space == "tanh":
            low, high = self.threat.box
            image = image.tanh_().add_(1).mul_((high - low) / 2).add_(low)
        return self.threat.project(image, state.x0)

    def _population(self, search: Search, state: NAttackState) -> Tensor:
        """The draws of each row's next block, (n, block, C, h, w)."""
        draws, dtype = search.draws(state), state.phi.dtype
        latent = state.phi.shape[1:]
        if not self.antithetic:
            return draws.normal(self._block, *latent, first=state.phase * self._block, dtype=dtype)
        half = self._block // 2
        noise = draws.normal(half, *latent, first=state.phase * half, dtype=dtype)
        return torch.stack([noise, -noise], 2).flatten(1, 2)  # pairs side by side: any even share of a block is paired

    def _gather(self, state: NAttackState, noise: Tensor, reward: Tensor, number: Tensor, asked: Tensor) -> None:
        """Add a block to the sums from which the update is made, so that no draw has to be kept."""
        reward = torch.where(asked & reward.isfinite(), reward, torch.nan)
        state.rewards = state.rewards.scatter(1, number, reward)
        state.shift = torch.where(state.phase == 0, reward.nanmean(1).nan_to_num(), state.shift)
        centred = (reward - state.shift[:, None]).nan_to_num(nan=0.0).to(noise.dtype)
        counted = reward.isfinite().to(noise.dtype)
        flat = noise.flatten(2)
        with torch.autocast(noise.device.type, enabled=False):
            sums = torch.stack([counted, centred], 1) @ flat
        state.noise = state.noise + sums[:, 0].view_as(state.phi)
        state.weighted = state.weighted + sums[:, 1].view_as(state.phi)
        state.phase = state.phase + 1

    def _update(self, state: NAttackState, complete: Tensor) -> None:
        """Move the mean of the rows whose population is complete, and begin the next one."""
        rewards = state.rewards
        known = rewards.isfinite()
        count = known.sum(1).clamp_min(1)
        mean = torch.where(known, rewards, 0).sum(1) / count
        spread = torch.where(known, (rewards - mean[:, None]) ** 2, 0).sum(1).div(count).sqrt()
        flat = torch.where(known, rewards, -torch.inf).amax(1) == torch.where(known, rewards, torch.inf).amin(1)
        centre, scale = (mean - state.shift, 1 / (spread + 1e-7)) if self.zscore else (-state.shift, spread * 0 + 1)
        direction = state.weighted - _rows(centre, state.phi) * state.noise
        rate = torch.where(flat & self.zscore, 0.0, scale * self.step_size / (self.samples * self.sigma))
        phi = state.phi + _rows(rate, state.phi) * direction
        chosen = complete[:, None, None, None]
        state.phi = torch.where(chosen, phi, state.phi)
        state.x = torch.where(chosen, self.render(state.phi.unsqueeze(1), state).squeeze(1), state.x)
        state.done = state.done | (complete & (known.sum(1) * 2 < self.samples))  # the model's answers are useless
        state.noise, state.weighted = state.noise * ~chosen, state.weighted * ~chosen
        state.rewards = torch.where(complete[:, None], torch.nan, rewards)
        state.phase = torch.where(complete, 0, state.phase)

    def _test_mean(self, search: Search, state: NAttackState) -> None:
        due = ((state.phase == 0) & (state.t % self.check_every == 0)).nonzero().squeeze(1)
        if len(due):
            search.scores(state.x[due], state[due], check=True)


def _rows(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)[:, None, None, None]


def _check(
    threat: ThreatModel,
    steps: int,
    samples: int,
    sigma: float,
    shrink: float,
    antithetic: bool,
    block: int,
    check_every: int,
    latent: int,
) -> None:
    check_threat(threat)
    if threat.norm not in ("linf", "l2"):
        raise ValueError(f"NAttack has rules for linf and l2, got norm {threat.norm!r}")
    if steps < 1 or block < 1 or check_every < 1 or latent < 1:
        raise ValueError(
            f"steps, block, check_every and latent must be >= 1, got {steps}, {block}, {check_every}, {latent}"
        )
    if samples < 2:
        raise ValueError(f"samples must be at least 2 (their rewards are compared), got {samples}")
    if antithetic and samples % 2:
        raise ValueError(f"samples must be even where antithetic, got {samples}")
    if sigma <= 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")
    if not 0 < shrink < 1:
        raise ValueError(f"shrink must lie in (0, 1), got {shrink}")
