"""Thermometer encoding, and the attack that its authors made for it: LS-PGA, in the space of codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack, Search, State, check_threat
from lit_adv.defense import Defense, straight_through
from lit_adv.draws import Draws
from lit_adv.gradients import examine
from lit_adv.losses import Loss, cross_entropy
from lit_adv.models.normalize import ImageInput
from lit_adv.oracle import Access, QueryOracle
from lit_adv.threat import ThreatModel

BELOW_ONE = 0.99999
"""Factor before the rounding, by which a pixel of exactly 1 falls into the last bucket and not beyond it."""


class Thermometer(Defense):
    """Each pixel becomes a code of ``levels`` channels that says in which of so many equal buckets it lies.

    With ``i = floor(0.99999 x levels)``, ``x`` cut to [0, 1], the thermometer code of a pixel is 1 in its channels
    0 to ``i`` and 0 above; the one-hot code is 1 in channel ``i`` alone. Channel ``l`` of colour ``c`` is the code's
    channel ``c levels + l``. The code is constant within a bucket, so it has no gradient; the surrogate's backward
    pass is that of the ramps ``r_l = clamp(levels x - (l - 1), 0, 1)``, which rise in the bucket below their level.
    They tell of the next level alone; those of :meth:`wide` reach two levels on and two back, and see past a bucket
    on the way to a better one where the ball is many buckets wide.

    Args:
        classifier: codes (n, C levels, H, W) to logits, e.g. ``ModelA(in_channels=16)``.
        levels: buckets of [0, 1], at least 2.
        code: what a bucket becomes.
        channels: colours C of the images; None: the input channels of the classifier, if it is one of
            :mod:`lit_adv.models`, by ``levels``.
        num_classes: length of the logits; None: the classifier's own ``num_classes``.

    Raises:
        ValueError: an argument out of its range, or a classifier that takes other codes; when called, no images.
    References:
        Buckman et al. 2018, https://openreview.net/forum?id=S18Su--CW, section 4. The ramp: Athalye, Carlini &
        Wagner 2018 (BPDA), https://arxiv.org/abs/1802.00420, section 5.2 and its code.
    """

    def __init__(
        self,
        classifier: nn.Module,
        levels: int = 16,
        code: Literal["thermometer", "one_hot"] = "thermometer",
        channels: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= levels <= 256 or levels != int(levels):
            raise ValueError(f"levels must be a whole number from 2 to 256, got {levels}")
        if code not in ("thermometer", "one_hot"):
            raise ValueError(f"code must be 'thermometer' or 'one_hot', got {code!r}")
        classes = getattr(classifier, "num_classes", None) if num_classes is None else num_classes
        if classes is None:
            raise ValueError(f"num_classes must be given, for {type(classifier).__name__} does not say it")
        self.classifier, self.levels, self.code, self.num_classes = classifier, levels, code, int(classes)
        self.channels = _channels(classifier, levels, channels)
        self.register_buffer("level", torch.arange(levels).view(-1, 1, 1), persistent=False)

    level: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K) of images (n, C, H, W)."""
        return self.classifier(self.encode(x))

    def surrogate(self, x: Tensor, **draws: Draws) -> Tensor:
        """Logits of images, with the gradient of the ramps; or of codes, hard or soft, with their own.

        Shape: (n, C, H, W), or codes (n, C levels, H, W) -> (n, K).
        """
        if x.dim() == 4 and x.shape[1] == self.channels * self.levels:  # never C, since there are two levels or more
            return self.classifier(x)
        return self.classifier(straight_through(self.encode(x), self.ramp(x)))

    def wide(self, x: Tensor) -> Tensor:
        """Logits of images, with the gradient of ramps over two buckets below a level and two above."""
        return self.classifier(straight_through(self.encode(x), self.ramp(x, 2, 2)))

    def hard(self, x: Tensor) -> Tensor:
        """Logits of images with the gradient of the code as it stands: exactly 0 everywhere."""
        code = self.encode(x)
        return self.classifier(code + 0.0 * x.repeat_interleave(self.levels, 1).to(code.dtype))

    def index(self, x: Tensor) -> Tensor:
        """The bucket of each pixel, from 0, as floating-point numbers (n, C, H, W)."""
        check_images(x, self.channels)
        return bucket(x, self.levels)

    def encode(self, x: Tensor) -> Tensor:
        """The exact codes of images: (n, C, H, W) -> (n, C levels, H, W), without a gradient."""
        index = self.index(x.detach()).unsqueeze(2)
        level = self.level.to(index.dtype)
        return (level <= index if self.code == "thermometer" else level == index).to(x.dtype).flatten(1, 2)

    def ramp(self, x: Tensor, below: float = 1.0, above: float = 0.0) -> Tensor:
        """Codes whose levels rise from 0 to 1 with the pixel; the lowest is always 1.

        Args:
            below: buckets before a level, from where on it rises.
            above: buckets behind it, up to where it rises.

        Shape: (n, C, H, W) -> (n, C levels, H, W).
        """
        check_images(x, self.channels)
        begin = self.level[1:].to(x.dtype) - below
        height = (self.levels * x.unsqueeze(2) - begin) / (below + above)
        # at the ends of a ramp torch's own clamp has no slope, and black pixels would never move
        ramp = torch.where((height >= 0) & (height < 1), height, height.detach().clamp(0, 1))
        ramp = torch.cat([torch.ones_like(ramp[:, :, :1]), ramp], 2)
        return self._as_coded(ramp).flatten(1, 2)

    def expected(self, shares: Tensor) -> Tensor:
        """The mean code of a pixel whose bucket is random: (n, C, levels, H, W) -> (n, C levels, H, W)."""
        if self.code == "one_hot":
            return shares.flatten(1, 2)
        level = self.level.to(shares.dtype).flatten()
        upwards = (level >= level[:, None]).to(shares.dtype)  # a level's code is the share of the buckets from it on
        return (upwards @ shares.flatten(3)).view_as(shares).flatten(1, 2)  # faster than sums forth and back

    def nearest(self, level: Tensor, x0: Tensor) -> Tensor:
        """The images in given buckets that lie nearest to clean ones, pixel by pixel.

        Shape: level (n, C, H, W) integers, x0 (n, C, H, W) -> (n, C, H, W).
        """
        least, most = edges(self.levels, x0.dtype, x0.device)
        return torch.minimum(torch.maximum(x0, least[level]), most[level])

    def extra_repr(self) -> str:
        return f"levels={self.levels}, code={self.code}, channels={self.channels}"

    def _as_coded(self, thermometer: Tensor) -> Tensor:
        """A one-hot code is the difference of a thermometer's neighbouring levels: (n, C, levels, H, W)."""
        if self.code == "thermometer":
            return thermometer
        return torch.cat([thermometer[:, :, :-1] - thermometer[:, :, 1:], thermometer[:, :, -1:]], 2)


def check_images(x: Tensor, channels: int) -> None:
    """Refuse what is no batch of images in or near [0, 1]; what an attack's probes leave it by is cut off later.

    Raises:
        ValueError: shape, type, NaN, or values of another scale.
    """
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"images must have shape (n, {channels}, H, W), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"images must be floats in [0, 1], got {x.dtype}: divide 8-bit images by 255")
    if x.numel():
        least, most = torch.aminmax(x.detach())
        if not bool((least >= -8) & (most <= 8)):  # False for NaN
            raise ValueError(
                f"images must be floats in [0, 1], got values in [{float(least):.3g}, {float(most):.3g}]: divide "
                "8-bit images by 255, and mend what makes NaN"
            )


def bucket(x: Tensor, levels: int) -> Tensor:
    """``floor(0.99999 x levels)`` of pixels cut to [0, 1], in float32 at least, as floating-point numbers."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (BELOW_ONE * x.clamp(0, 1) * levels).floor()


@lru_cache(maxsize=32)
def edges(levels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The least and the largest number of a type in each bucket, (levels,) each: where rounding really puts it."""
    with torch.inference_mode(False):
        number = torch.arange(levels, dtype=dtype)
        below = torch.tensor(-1.0, dtype=dtype)
        tried = [number / levels / BELOW_ONE]
        for _ in range(8):
            tried.insert(0, torch.nextafter(tried[0], below))
            tried.append(torch.nextafter(tried[-1], -below))
        near = torch.stack(tried)
        first = (bucket(near, levels) >= number).int().argmax(0)
        least = near.gather(0, first[None]).squeeze(0)
        least[0] = 0
        most = torch.cat([torch.nextafter(least[1:], below), torch.ones(1, dtype=dtype)])
        return least.to(device), most.to(device)


def _channels(classifier: nn.Module, levels: int, channels: int | None) -> int:
    inputs = next((part.channels for part in classifier.modules() if isinstance(part, ImageInput)), None)
    if channels is None:
        if inputs is None:
            raise ValueError(f"channels must be given, for {type(classifier).__name__} does not say what it takes")
        channels = max(1, inputs // levels)
    if channels < 1 or (inputs is not None and inputs != channels * levels):
        raise ValueError(
            f"a code of {levels} levels has {levels} channels a colour, but {type(classifier).__name__} takes {inputs} "
            f"channels (images: {channels}): build it with in_channels={levels} for grey images, {3 * levels} for "
            "coloured ones"
        )
    return channels


@dataclass(kw_only=True)
class LSPGAState(State):
    """Adds the logits of every pixel's levels, and which of them the ball reaches: (n, C, levels, H, W)."""

    u: Tensor
    reached: Tensor


class LSPGA(IterativeAttack):
    """Logit-space projected gradient ascent: which bucket should each pixel be in, of those that the ball reaches?

    Every reachable level of a pixel has a logit ``u``; the softmax of ``inv_temp u`` is a random bucket, whose mean
    code the classifier is given. ``u`` climbs the gradient of the loss, and ``inv_temp`` grows by a factor in every
    step, so that the mean code comes near to a real one. The image of a step is, in each pixel, the point of the
    level of the largest ``u`` (of several: the clean one, if it is among them) that lies nearest to the clean pixel.

    A step asks twice: for the gradient at the mean code, which is no image, and about the image.

    Args:
        threat: norm linf, radius and box.
        steps: gradient steps per start.
        step_size: length of a step in ``u``.
        sign: step along the gradient's sign, as the paper says; False: along the gradient itself, as its released
            code does with ``step_size=0.01``.
        growth: of ``inv_temp`` in each step.
        random_start: begin at Gaussian ``u`` with deviation ``step_size``; False: at 0, all levels alike.
        restarts: starts of an unbroken image; more than one need ``random_start``.
        loss: what is ascended, see :mod:`lit_adv.losses`.
        check_every: steps between questions about the image; the last step's is always asked about.
        stop_at_hit: False runs all steps of every image.
        seed: of the random starts.

    Raises:
        ValueError: an argument out of its range, or a model that is no :class:`Thermometer`.
    References:
        Buckman et al. 2018, https://openreview.net/forum?id=S18Su--CW, section 5 and appendix. Its authors' labels
        are the model's own answers; here the true ones (``Madry(attack_label="predicted")`` for theirs).
    """

    access = Access.GRADIENT
    looks_first = True
    attacks = Thermometer

    def __init__(
        self,
        threat: ThreatModel = ThreatModel(),  # noqa: B008 - frozen
        steps: int = 7,
        step_size: float = 1.0,
        sign: bool = True,
        growth: float = 1.2,
        random_start: bool = False,
        restarts: int = 1,
        loss: Loss = cross_entropy,
        check_every: int = 1,
        stop_at_hit: bool = True,
        seed: int = 0,
    ) -> None:
        check_threat(threat)
        if threat.norm != "linf":
            raise ValueError(
                f"LSPGA needs a threat of norm 'linf', which each pixel meets by itself, got {threat.norm!r}"
            )
        for name, value in (("steps", steps), ("restarts", restarts), ("check_every", check_every)):
            if value < 1 or value != int(value):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if not step_size >= 0 or not growth > 0:
            raise ValueError(f"step_size must be >= 0 and growth > 0, got {step_size} and {growth}")
        if restarts > 1 and not random_start:
            raise ValueError(f"restarts must be 1 without random_start, for all would be the same, got {restarts}")
        self.threat, self.steps, self.step_size, self.sign, self.growth = threat, steps, step_size, sign, growth
        self.random_start, self.restarts, self.loss = random_start, restarts, loss
        self.check_every, self.stop_at_hit, self.seed = check_every, stop_at_hit, seed

    def cost(self, shape: torch.Size, state: State | None = None) -> int | Tensor:
        return 1 + int(self.check_every == 1) if state is None else 1 + self._due(state).long()

    def start(self, search: Search, rows: Tensor) -> LSPGAState:
        model = thermometer_of(search.oracle)
        fields = search.fresh(rows)
        x0: Tensor = fields["x0"]
        low, high = self.threat.box
        lower, upper = (x0 - self.threat.radius).clamp_min(low), (x0 + self.threat.radius).clamp_max(high)
        level = model.level.to(x0.dtype)
        reached = (level >= model.index(lower).unsqueeze(2)) & (level <= model.index(upper).unsqueeze(2))
        u = torch.zeros(reached.shape, dtype=x0.dtype, device=x0.device)
        if self.random_start:
            u = self.step_size * search.starting_draws(rows).normal(*reached.shape[1:], dtype=x0.dtype)
        return LSPGAState(**fields, u=u, reached=reached)

    def step(self, search: Search, state: State) -> State:
        assert isinstance(state, LSPGAState)
        model = thermometer_of(search.oracle)
        gradient = self._gradient(search, state, model)
        state.u = state.u.add(gradient.sign() if self.sign else gradient.nan_to_num(0, 0, 0), alpha=self.step_size)
        if not search.watch:
            if bool((state.t + 1 >= self.steps).any()):
                state.x = self._image(state, model)
            return state
        state.x = self._image(state, model)
        due = self._due(state)
        asked = state if bool(due.all()) else state[due.nonzero().squeeze(1)]
        if len(asked):
            search.scores(asked.x, asked)
        state.done = state.t + 1 >= self.steps  # the last image has been asked about
        return state

    def _due(self, state: State) -> Tensor:
        """Rows whose image is asked about in this step, (n,) bool."""
        return ((state.t + 1) % self.check_every == 0) | (state.t + 1 >= self.steps)

    def _gradient(self, search: Search, state: LSPGAState, model: Thermometer) -> Tensor:
        u = state.u.detach().requires_grad_()
        with torch.enable_grad():
            sharp = u * (self.growth ** state.t.to(u.dtype))[:, None, None, None, None]
            shares = sharp.masked_fill(~state.reached, -torch.inf).softmax(2)
            scores = search.scores(model.expected(shares), state, candidate=False)
            value = self.loss(scores, state.y, state.target, search.reject)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        examine(search, state, gradient)
        return gradient

    def _image(self, state: LSPGAState, model: Thermometer) -> Tensor:
        u = state.u.masked_fill(~state.reached, -torch.inf)
        largest, level = u.max(2)
        own = model.index(state.x0).long()
        tied = u.gather(2, own.unsqueeze(2)).squeeze(2) >= largest
        return model.nearest(torch.where(tied, own, level), state.x0)


def thermometer_of(oracle: QueryOracle) -> Thermometer:
    """The model under attack, if it is coded in thermometers.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(oracle.model, Thermometer):
        raise ValueError(
            f"LSPGA climbs in the codes of a lit_adv.defenses.Thermometer, and got {type(oracle.model).__name__}: "
            "attack it by lit_adv.attacks.PGD, which goes through the model's own surrogate"
        )
    return oracle.model
