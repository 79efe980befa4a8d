"""GCD: two complementary detectors guard a classifier; what they find is refused, or rectified and classified anew."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from lit_adv.defense import Defense, straight_through
from lit_adv.detector import NetworkDetector
from lit_adv.draws import Draws, fresh_draws
from lit_adv.fingerprint import digest
from lit_adv.inputs import check_images, class_count, precise, wide
from lit_adv.models.frozen import Folded
from lit_adv.response import Response, answered
from lit_adv.suppression import MODES, MaskMode, suppressed, suspects

Answer = Literal["reject", "rectify"]
Column = Literal["additive", "product", "product2"]
SETTINGS = (
    "answer", "column", "threshold", "alpha", "mode", "joint", "share", "reading", "averages", "num_classes",
)  # fmt: skip


class Judgement(NamedTuple):
    """What the detectors say of images, (n,) each.

    Attributes:
        margin: of the ensemble, before the threshold; positive where adversarial.
        by_image: whether the image detector has decided, else the sensitivity detector.
        image: margin of the image detector. sensitivity: of the sensitivity detector; NaN where there is none.
    """

    margin: Tensor
    by_image: Tensor
    image: Tensor
    sensitivity: Tensor


class GuidedComplementary(Defense):
    """A classifier guarded by a detector of images and one of gradient maps; the surer of the two decides.

    The detector of smaller entropy is chosen (equations (10) and (11)), a tie goes to the sensitivity detector. Binary
    entropy falls strictly with the size of the margin, so the one with the larger ``|margin|`` is taken: the literal
    entropies saturate in float32. An image whose margin exceeds the threshold is adversarial, and

    * ``reject``: refused: one more column, ``max logit + margin`` (``additive``). ``product``: ``(margin + 1) max
      logit`` of logits less their mean (Carlini & Wagner 2017), which agrees on every decision; ``product2``:
      ``2 (1 + margin) max(max logit, 0)`` of their code, which refuses from margin -1/2 on, and whatever the margin
      where no logit is positive. The difference of column and largest logit is the margin for ``additive`` alone: only
      there do losses that weigh the detector's margin (equation (14)) see the margin itself.
    * ``rectify``: its pixels to which the deciding detector's margin is most sensitive are suppressed at random
      (equations (12) and (13)), and the rectifier, the classifier fine-tuned on such images, answers.

    Differentiable as it is, through the gradient map too (double backward), so every attack on ``reject`` is aware of
    the detectors by itself. On ``rectify`` it is not: no gradient leads from the margin to the answer, so nothing tells
    an attack to hide. A rectifying defence is to be attacked also with images made against
    ``variant(answer="reject")``, the worse case counting for each image. Of a rectified image the gradient passes as if
    nothing had been suppressed (BPDA with the identity); which detector decides, and whether, is fixed in
    differentiation. ``surrogate="classifier"`` attacks the classifier alone (the grey box).

    Args:
        classifier: f, images (n, C, H, W) in [0, 1] to logits (n, K); frozen.
        image_detector: DET_org. sensitivity_detector: DET_IS. Trained for this very classifier; at least one.
        rectifier: f_rec; needed to rectify; None: refuse.
        answer: what becomes of an adversarial image.
        column: form of the refusal's logit.
        threshold: margin above which an image is adversarial; the paper's is 0; a quantile of clean images' margins
            fixes the rate of false alarms.
        alpha: of equation (12), in [0, 1]; the paper's: MNIST 0.55, CIFAR-10 0.65, ImageNet 0.45.
        mode, joint: how suspects are chosen, see :func:`lit_adv.suppression.suspects`.
        share: probability with which a suspect is replaced, in [0, 1]; the paper does not say.
        reading: sensitivity of the sensitivity detector's margin to the ``image``, through the gradient map, or to the
            ``map`` itself; the paper's equation (12) allows both.
        averages: draws of a rectified image whose probabilities are averaged.
        num_classes: K; None: as the networks say.

    Raises:
        ValueError: no detector, a rectification without a rectifier, an argument out of its range; when first asked: a
            detector that was trained for another classifier; images of another rank, with NaN or far outside [0, 1].
    References:
        Li, Wang & Wu 2020, "Are L2 adversarial examples intrinsically different?", equations (10) to (13). Carlini &
        Wagner 2017, https://arxiv.org/abs/1705.07263, section 2.4 (the further column).
    """

    def __init__(
        self,
        classifier: nn.Module,
        image_detector: nn.Module | None = None,  # NetworkDetectors; a configuration may name a checkpoint
        sensitivity_detector: nn.Module | None = None,
        rectifier: nn.Module | None = None,
        answer: Answer = "reject",
        column: Column = "additive",
        threshold: float = 0.0,
        alpha: float = 0.55,
        mode: MaskMode = "threshold",
        joint: bool = False,
        share: float = 0.5,
        reading: Literal["image", "map"] = "image",
        averages: int = 1,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.answer, self.column, self.threshold = answer, column, float(threshold)
        self.alpha, self.mode, self.joint, self.share = float(alpha), mode, joint, float(share)
        self.reading, self.averages = reading, averages
        self.num_classes = class_count(classifier, [] if rectifier is None else [rectifier], num_classes, "rectifier")
        self.classifier, self.rectifier = classifier, rectifier
        self.image_detector = _detector("image_detector", image_detector)
        self.sensitivity_detector = _detector("sensitivity_detector", sensitivity_detector)
        _check(self)
        self.classifier.eval().requires_grad_(False)
        for detector in self._detectors():
            detector.eval().requires_grad_(False)
        self.reject = self.num_classes if answer == "reject" else None
        self.stochastic = answer == "rectify" and self.share > 0
        self._folded = Folded()
        self._settled = False
        self.register_load_state_dict_post_hook(_unsettle)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        response = self._respond(x)
        margin = self.judge(response).margin - self.threshold
        if self.answer == "reject":
            return _with_column(response.logits, margin, self.column)
        flagged = (margin > 0).nonzero().squeeze(1)
        if not len(flagged):
            return response.logits
        return response.logits.index_copy(0, flagged, self._rectified(response.x, flagged, draws))

    def margin(self, x: Tensor) -> Tensor:
        """Margin (n,) of the ensemble, before the threshold: positive where an image looks adversarial."""
        return self.judge(self._respond(x)).margin

    def judgement(self, x: Tensor) -> Judgement:
        """What both detectors say of images."""
        return self.judge(self._respond(x))

    def judge(self, response: Response) -> Judgement:
        """What both detectors say, of the classifier's response."""
        of_image = self._margin(self.image_detector, response)
        of_map = self._margin(self.sensitivity_detector, response)
        if self.sensitivity_detector is None:
            by_image = torch.ones(len(response.x), dtype=torch.bool, device=response.x.device)
        elif self.image_detector is None:
            by_image = torch.zeros(len(response.x), dtype=torch.bool, device=response.x.device)
        else:
            by_image = of_image.detach().abs() > of_map.detach().abs()
        return Judgement(torch.where(by_image, of_image, of_map), by_image, of_image, of_map)

    def sensitivity(self, x: Tensor) -> Tensor:
        """Size of the derivative of the deciding detector's margin to each value of the image, without a graph.

        The derivative of the detector's cross-entropy at its decision is a multiple of it in each image, which equation
        (12) does not see, and vanishes where the detector is sure.

        Shape: (n, C, H, W) to the same.
        """
        check_images(x)
        with precise(x):
            leaf = wide(x.detach().clone()).requires_grad_()
            if not len(leaf):
                return leaf.detach()
            response = self._respond(leaf)
            if self.reading == "map" and self.sensitivity_detector is not None:
                return self._to_the_map(leaf)
            (slope,) = torch.autograd.grad(self.judge(response).margin.sum(), leaf)
        return slope.abs()

    def suspects(self, x: Tensor) -> Tensor:
        """Values to be suppressed, bool of the shape of x (n, C, H, W): equation (12)."""
        return suspects(self.sensitivity(x), self.alpha, self.mode, self.joint)

    def patched(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Images (n, C, H, W) whose suspects are suppressed at random, once: equations (12) and (13)."""
        return suppressed(x.detach(), self.suspects(x), self.share, draws)

    def variant(self, **changes: Any) -> GuidedComplementary:
        """The same networks, not copies, with other settings; arguments as of the class."""
        networks = {name: getattr(self, name) for name in NETWORKS}
        settings = {name: getattr(self, name) for name in SETTINGS}
        return GuidedComplementary(**{**networks, **settings, **changes}).train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode of the rectifier; all else stays in eval mode."""
        super().train(mode)
        for network in (self.classifier, *self._detectors()):
            network.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether the rectifier collects gradients; no other network does."""
        super().requires_grad_(requires_grad)
        for network in (self.classifier, *self._detectors()):
            network.requires_grad_(False)
        return self

    def _rectified(self, x: Tensor, rows: Tensor, draws: Draws | None) -> Tensor:
        """The rectifier's logits, or log-probabilities where several draws are averaged, for some of the images."""
        assert self.rectifier is not None
        draws = (fresh_draws(x) if draws is None else draws)[rows]
        chosen = x[rows]
        mask = self.suspects(chosen)
        answers = []
        for _ in range(self.averages):
            patched = suppressed(chosen.detach(), mask, self.share, draws)  # further numbers with every call
            seen = straight_through(patched, chosen) if chosen.requires_grad else patched
            answers.append(answered(self.rectifier, seen))
        if self.averages == 1:
            return answers[0]
        return torch.stack([logits.log_softmax(-1) for logits in answers]).logsumexp(0) - math.log(self.averages)

    def _to_the_map(self, x: Tensor) -> Tensor:
        """As :meth:`sensitivity`, the sensitivity detector's taken with respect to the view it was given."""
        assert self.sensitivity_detector is not None
        response = self._respond(x.detach())
        view = self.sensitivity_detector.view(response).detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.sensitivity_detector.judge(view).sum(), view)
        if self.image_detector is None:
            return slope.abs()
        (own,) = torch.autograd.grad(self.image_detector.margin(x).sum(), x)
        return torch.where(self.judge(response).by_image[:, None, None, None], own, slope).abs()

    def _margin(self, detector: NetworkDetector | None, response: Response) -> Tensor:
        if detector is None:
            return torch.full_like(response.x[:, 0, 0, 0], math.nan)
        return detector.judge(detector.view(response))

    def _respond(self, x: Tensor) -> Response:
        check_images(x)
        self._settle()
        return Response(self._folded(self.classifier), x)

    def _detectors(self) -> list[NetworkDetector]:
        return [d for d in (self.image_detector, self.sensitivity_detector) if d is not None]

    def _settle(self) -> None:
        """See that the detectors serve this classifier; then it is one network that all share.

        Not before the first call: a defence rebuilt from a checkpoint gets its weights only after it was made.
        """
        if self._settled:
            return
        own = None
        for name in ("image_detector", "sensitivity_detector"):
            detector: NetworkDetector | None = getattr(self, name)
            if detector is None or detector.classifier is None or detector.classifier is self.classifier:
                continue
            own = digest(self.classifier.state_dict(), "") if own is None else own
            if not torch.equal(digest(detector.classifier.state_dict(), ""), own):
                raise ValueError(
                    f"{name} was trained for another classifier than the one given: its weights differ; train a "
                    "detector for this classifier"
                )
            detector.classifier = self.classifier
        self._settled = True


NETWORKS = ("classifier", "image_detector", "sensitivity_detector", "rectifier")


def _with_column(logits: Tensor, margin: Tensor, column: Column) -> Tensor:
    """Logits with the refusal's beside them, (n, K + 1)."""
    if column == "product":
        logits = logits - logits.mean(-1, keepdim=True)
    most = logits.amax(-1)
    if column == "additive":
        last = most + margin
    elif column == "product":
        last = (margin + 1) * most
    else:
        last = 2 * (1 + margin) * most.clamp_min(0)
    return torch.cat([logits, last[:, None]], 1)


def _detector(name: str, given: nn.Module | None) -> NetworkDetector | None:
    if given is not None and not isinstance(given, NetworkDetector):
        raise ValueError(
            f"{name} must be a detector with a network, as lit_adv.detectors.ImageDetector, got {type(given).__name__}"
        )
    return given


def _unsettle(defense: GuidedComplementary, incompatible: Any) -> None:
    defense._settled = False


def _check(defense: GuidedComplementary) -> None:
    if not defense._detectors():
        raise ValueError("give image_detector, sensitivity_detector or both: without one nothing is ever found")
    for name, known in (("answer", ("reject", "rectify")), ("column", ("additive", "product", "product2")),
                        ("mode", MODES), ("reading", ("image", "map"))):  # fmt: skip
        if getattr(defense, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(defense, name)!r}")
    if defense.answer == "rectify" and defense.rectifier is None:
        raise ValueError("answer='rectify' needs a rectifier: give one, or answer='reject'")
    for name in ("alpha", "share"):
        if not 0 <= getattr(defense, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(defense, name)}")
    if not math.isfinite(defense.threshold):
        raise ValueError(f"threshold must be finite, got {defense.threshold}")
    if defense.averages < 1 or defense.averages != int(defense.averages):
        raise ValueError(f"averages must be a whole number of at least 1, got {defense.averages}")
