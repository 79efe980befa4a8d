"""Adversarial transformation f_a(g(x)): images are moved far along a fixed classifier's gradient, then classified."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.answers import dtype_of
from lit_adv.defense import Defense, straight_through
from lit_adv.draws import Draws, fresh_draws
from lit_adv.fingerprint import digest
from lit_adv.inputs import check_images, class_count, precise, wide
from lit_adv.models.frozen import Folded

Mode = Literal["least_likely", "untargeted", "random_target", "noise", "spatial", "none"]
MODES = ("least_likely", "untargeted", "random_target", "noise", "spatial", "none")
DESCENDING = ("least_likely", "untargeted", "random_target")  # those that ask f_b for gradients
SETTINGS = ("delta", "steps", "step_size", "mode", "norm", "random_start", "box")


class AdversarialTransformation(Defense):
    """f_a(g(x)), where g is a targeted PGD of many steps and a large radius on another, frozen classifier f_b.

    g moves each image from a random point of the ball towards the class that f_b finds least likely, so that what f_a
    sees lies as far from x as the ball allows, wherever an attacker moved x by a little. f_a is trained behind g.
    The defence works by masking gradients: the Jacobian of g is the identity almost everywhere (sign has derivative
    0, the ball moves with x), whatever g does. What an attacker may differentiate instead has names, to be given to
    an evaluation as ``surrogate``:

    * by default the identity (BPDA-I, the paper's strongest): exact value, the gradient of f_a at g(x);
    * ``unrolled``: plain autograd through all steps, which is the same (without ``box``), and shows it;
    * ``softsign``, ``tanh``: BPDA with a smooth sign and the smooth projection of equation (5), with second
      derivatives of f_b; ``softsign_scaled``, ``tanh_scaled``: their argument divided by the median of its size in
      each image, for a raw gradient is so small that a smooth sign of it is a straight line; ``softsign_literal``,
      ``tanh_literal``: the point as the state and the centre of the ball held fixed;
    * ``classifier``: f_a alone, g ignored (white-box transfer).

    Departures from the released code: it ascends the loss of f_b's most likely class (``untargeted``), its targeted
    mode has no random start, its step is delta / 10; it writes gradients into f_b. As there and in the paper, g(x) is
    not clipped to [0, 1] unless ``box`` is set.

    Args:
        classifier: f_a, (n, C, H, W) to logits (n, K); trained on what g makes.
        reference: f_b, images to logits of the same classes, its normalisation inside; several: each image draws one.
            Always in eval mode and never trained.
        delta: radius of g in pixel units, at least 0; 0 leaves images as they are.
        steps: of g, at least 0.
        step_size: of g in pixel units, at least 0; None: delta / 6.
        mode: ``least_likely``: descend the cross-entropy to f_b's least likely class at x. Ablations of the released
            code: ``untargeted``; ``random_target``; ``noise``, a random point of the ball; ``spatial``, a random
            affine map whose six entries are off by up to delta (no ball then); ``none``.
        norm: of the ball, linf or l2.
        random_start: begin at a random point of the ball, fresh for every image and call; else at x.
        box: clip to [0, 1] after every step.
        num_classes: of both; None: as they say.

    Attributes:
        fingerprint: SHA-256 of f_b's weights and g's settings, in checkpoints: f_a is worthless behind another g.

    Raises:
        ValueError: an argument out of its range, or f_a and f_b of different classes; when called: images of another
            rank, with NaN or inf, or far outside [0, 1] (an attack's probes may leave it by up to 1). TypeError: images
            of integers. When loaded: f_b or settings other than those in the file's fingerprint.
    References:
        Xiao & Zheng 2020, "One Man's Trash is Another Man's Treasure: Resisting Adversarial Examples by Adversarial
        Examples", CVPR: equations (2) to (5); delta 0.2, 13 steps of delta / 6.
    """

    fingerprint: Tensor

    def __init__(
        self,
        classifier: nn.Module,
        reference: nn.Module | list[nn.Module],
        delta: float = 0.2,
        steps: int = 13,
        step_size: float | None = None,
        mode: Mode = "least_likely",
        norm: Literal["linf", "l2"] = "linf",
        random_start: bool = True,
        box: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.delta, self.steps = float(delta), steps
        self.step_size = None if step_size is None else float(step_size)
        self.mode, self.norm, self.random_start, self.box = mode, norm, random_start, box
        several = [reference] if isinstance(reference, nn.Module) else list(reference)
        _check(self, several)
        self.num_classes = class_count(classifier, several, num_classes)
        self.classifier = classifier
        self.reference = several[0] if len(several) == 1 else nn.ModuleList(several)
        self.reference.eval().requires_grad_(False)
        drawing = random_start or mode in ("random_target", "noise", "spatial") or len(several) > 1
        self.stochastic = drawing and mode != "none" and self.delta > 0
        self._folded = Folded()
        self.register_buffer("fingerprint", torch.zeros(32, dtype=torch.uint8))
        self.register_state_dict_pre_hook(_sign)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_verify)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        return self._classified(self._passed(x, draws))

    def transform(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """g(x), cut off any graph; in float32 at least, whatever autocast says.

        Shape: (n, C, H, W) in [0, 1] to (n, C, H, W) in [-delta, 1 + delta] ([0, 1] with ``box``).
        """
        with precise(x):
            x = wide(x.detach().clone() if x.is_inference() else x.detach())
            if not self._moves(x):
                return x
            draws = fresh_draws(x) if draws is None else draws
            if self.mode == "spatial":
                return self._mapped(x, draws)
            delta, aim, pick = self._begun(x, draws)
            for _ in range(self.steps if self.mode in DESCENDING else 0):
                leaf = (x + delta).requires_grad_()
                slope = self._slope(leaf, aim, pick)
                delta = self._within(x, delta - self._stride * self._direction(slope))
            return (x + delta).detach()

    def unrolled(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """f_a behind g with plain autograd through every step: minimum and maximum with the bounds x +- delta."""
        if not self._differentiates(x):
            return self(x, draws)
        with precise(x):
            x = wide(x)
            draws = fresh_draws(x) if draws is None else draws
            delta, aim, pick = self._begun(x.detach(), draws)
            point = x + delta
            for _ in range(self.steps):
                slope = self._slope(point, aim, pick, keep=True)  # the derivative of sign is 0
                point = point - self._stride * self._direction(slope).detach()
                point = torch.minimum(torch.maximum(point, x - self.delta), x + self.delta)
                point = torch.minimum(torch.maximum(point, x.new_zeros(())), x.new_ones(())) if self.box else point
        return self._classified(point)

    def softsign(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """BPDA: backwards, sign is softsign, of the raw gradient."""
        return self._classified(self._smooth(x, draws, F.softsign))

    def tanh(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """BPDA: backwards, sign is tanh, of the raw gradient."""
        return self._classified(self._smooth(x, draws, torch.tanh))

    def softsign_scaled(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """As ``softsign``, of the gradient over the median of its size."""
        return self._classified(self._smooth(x, draws, F.softsign, scaled=True))

    def tanh_scaled(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """As ``tanh``, of the gradient over the median of its size."""
        return self._classified(self._smooth(x, draws, torch.tanh, scaled=True))

    def softsign_literal(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """As ``softsign``, the ball's centre held fixed."""
        return self._classified(self._smooth(x, draws, F.softsign, literal=True))

    def tanh_literal(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """As ``tanh``, the ball's centre held fixed."""
        return self._classified(self._smooth(x, draws, torch.tanh, literal=True))

    def variant(self, **changes: Any) -> AdversarialTransformation:
        """The same networks, not copies, behind a g with other settings; arguments as of the class."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        networks = {"classifier": self.classifier, "reference": self._references()}
        other = AdversarialTransformation(**{**networks, "num_classes": self.num_classes, **settings, **changes})
        return other.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode of f_a; f_b stays in eval mode."""
        super().train(mode)
        self.reference.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether f_a collects gradients; f_b never does."""
        super().requires_grad_(requires_grad)
        self.reference.requires_grad_(False)
        return self

    def _passed(self, x: Tensor, draws: Draws | None) -> Tensor:
        """g(x) with the gradient of the identity, where x has one."""
        z = self.transform(x, draws)
        return straight_through(z, x) if x.requires_grad and torch.is_grad_enabled() else z

    def _classified(self, z: Tensor) -> Tensor:
        dtype = dtype_of(self.classifier)
        return self.classifier(z.to(dtype) if dtype in (torch.float16, torch.bfloat16) else z)

    @property
    def _stride(self) -> float:
        """The step along the gradient: negative where the loss is to rise."""
        size = self.delta / 6 if self.step_size is None else self.step_size
        return -size if self.mode == "untargeted" else size

    def _references(self) -> list[nn.Module]:
        return list(self.reference) if isinstance(self.reference, nn.ModuleList) else [self.reference]

    def _moves(self, x: Tensor) -> bool:
        """Whether g does anything to these images, which are refused if they are none."""
        check_images(x)
        return self.mode != "none" and self.delta > 0 and len(x) > 0

    def _differentiates(self, x: Tensor) -> bool:
        """Whether there is a graph through g to be made; where g does nothing, the identity's gradient is exact."""
        if not (x.requires_grad and torch.is_grad_enabled() and self._moves(x)):
            return False
        if self.norm != "linf" or self.mode not in DESCENDING:
            raise ValueError(
                f"g with mode {self.mode!r} and norm {self.norm!r} has no unrolled or smooth backward pass, only "
                "linf and the modes that follow f_b's gradient have: use the default surrogate (BPDA-I)"
            )
        return True

    def _smooth(
        self,
        x: Tensor,
        draws: Draws | None,
        operator: Callable[[Tensor], Tensor],
        scaled: bool = False,
        literal: bool = False,
    ) -> Tensor:
        """g(x) whose backward pass is that of a smooth sign and of the projection of equation (5)."""
        if not self._differentiates(x):
            return self._passed(x, draws)
        with precise(x):
            x = wide(x)
            draws = fresh_draws(x) if draws is None else draws
            centre = x.detach()
            delta, aim, pick = self._begun(centre, draws)
            base = x
            if literal:  # the offset carries the gradient of x from its start on
                base, delta = centre, delta + (x - centre)
            for _ in range(self.steps):
                slope = self._slope(base + delta, aim, pick, keep=True)
                smooth = operator(slope / _middle(slope) if scaled else slope)
                offset = delta - self._stride * straight_through(slope.sign(), smooth)
                delta = straight_through(self._within(centre, offset.detach()), offset * self._passing(offset))
            return base + delta

    def _passing(self, offset: Tensor) -> Tensor:
        """Derivative of the smooth projection, equation (5) of the offset: 1 inside, 1 / (1 + |u|)^2 outside."""
        size = offset.detach().abs()
        return torch.where(size < self.delta, 1.0, (1 + size) ** -2)

    def _begun(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where g begins (an offset), the class it is about, and which f_b serves each image (None: there is one)."""
        several = len(self._references())
        pick = draws.integers(several, 1).squeeze(1) if several > 1 else None
        aim = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.mode == "random_target":
            aim = draws.integers(self.num_classes, 1).squeeze(1)
        elif self.mode in DESCENDING:
            with torch.no_grad():
                scores = self._scores(x, pick)
            if scores.shape[1] != self.num_classes:
                raise ValueError(f"f_b answers {scores.shape[1]} classes and f_a {self.num_classes}: take another f_b")
            aim = scores.argmin(1) if self.mode == "least_likely" else scores.argmax(1)
        if not self.random_start and self.mode != "noise":
            return torch.zeros_like(x), aim, pick
        if self.norm == "linf":
            start = draws.uniform(*x.shape[1:], low=-self.delta, high=self.delta, dtype=x.dtype)
        else:
            start = draws.normal(*x.shape[1:], dtype=x.dtype)
            length = self.delta * draws.uniform(1, dtype=x.dtype) ** (1 / x[0].numel())
            start = start * (length.squeeze(1) / _length(start))[:, None, None, None]
        return self._within(x, start), aim, pick

    def _scores(self, x: Tensor, pick: Tensor | None) -> Tensor:
        """f_b's logits, each image by the network it has drawn."""
        networks = [self._folded(network) for network in self._references()]
        own = [x.to(dtype_of(network) or x.dtype) for network in networks]
        if pick is None:
            return networks[0](own[0]).to(x.dtype)
        places = [(pick == number).nonzero().squeeze(1) for number in range(len(own))]
        told = [net(z[p]).to(x.dtype) for net, z, p in zip(networks, own, places, strict=True)]
        return torch.cat(told)[torch.cat(places).argsort()]

    def _slope(self, point: Tensor, aim: Tensor, pick: Tensor | None, keep: bool = False) -> Tensor:
        """Gradient of each image's cross-entropy; summed, so that no image counts less in a larger batch."""
        loss = F.cross_entropy(self._scores(point, pick), aim, reduction="sum")
        (slope,) = torch.autograd.grad(loss, point, create_graph=keep)
        return slope

    def _direction(self, slope: Tensor) -> Tensor:
        if self.norm == "linf":
            return slope.sign()
        return slope / _length(slope).clamp_min(1e-30)[:, None, None, None]

    def _within(self, x: Tensor, offset: Tensor) -> Tensor:
        """The offset, projected into the ball, and x + offset into [0, 1] if asked."""
        if self.norm == "linf":
            offset = offset.clamp(-self.delta, self.delta)
        else:
            offset = offset * (self.delta / _length(offset).clamp_min(1e-30)).clamp_max(1.0)[:, None, None, None]
        return (x + offset).clamp(0, 1) - x if self.box else offset

    def _mapped(self, x: Tensor, draws: Draws) -> Tensor:
        off = draws.uniform(2, 3, low=-self.delta, high=self.delta, dtype=x.dtype)
        grid = F.affine_grid(torch.eye(2, 3, dtype=x.dtype, device=x.device) + off, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _middle(slope: Tensor) -> Tensor:
    """Median of the size of each image's gradient; 1 where most of it has vanished, and nothing can be scaled."""
    size = slope.detach().abs().flatten(1).median(1).values
    return torch.where(size > 1e-30, size, 1.0)[:, None, None, None]


def _length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _check(defense: AdversarialTransformation, references: Sequence[nn.Module]) -> None:
    delta, size = defense.delta, defense.step_size
    if not (math.isfinite(delta) and delta >= 0):
        raise ValueError(f"delta must be a finite radius in pixel units, at least 0, got {delta}")
    if not isinstance(defense.steps, int) or defense.steps < 0:
        raise ValueError(f"steps must be a whole number, at least 0, got {defense.steps}")
    if size is not None and not (math.isfinite(size) and size >= 0):
        raise ValueError(f"step_size must be finite and at least 0, or None for delta / 6, got {size}")
    if defense.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {defense.mode!r}")
    if defense.norm not in ("linf", "l2"):
        raise ValueError(f"norm must be linf or l2, got {defense.norm!r}")
    if not references:
        raise ValueError("reference must be a classifier or a list of some, got an empty list")
    if delta > 0.5 and defense.norm == "linf":
        warnings.warn(
            f"delta {delta:g} is more than half of the pixel range: little of the image is left", stacklevel=3
        )


def _hash(defense: AdversarialTransformation) -> Tensor:
    return digest(defense.reference.state_dict(), [getattr(defense, name) for name in SETTINGS])


def _sign(defense: AdversarialTransformation, prefix: str, keep_vars: bool) -> None:
    """Before its state is read: the fingerprint is that of the f_b and g at hand."""
    defense.fingerprint = _hash(defense).to(defense.fingerprint.device)


def _verify(defense: AdversarialTransformation, incompatible: Any) -> None:
    """After a state is loaded: f_b's weights and g's settings must be those that f_a was saved with."""
    signed = bool(defense.fingerprint.any())
    if signed and not torch.equal(defense.fingerprint.cpu(), _hash(defense)):
        settings = ", ".join(f"{name} {getattr(defense, name)}" for name in SETTINGS)
        raise ValueError(
            "these weights of f_a were trained behind another g: f_b's weights in the file are not those it was saved "
            f"with, or the settings differ from the present ones ({settings}); rebuild the defence as it was trained"
        )
