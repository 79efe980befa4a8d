"""A detector: how much an image looks adversarial to the classifier it protects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from lit_adv.answers import evaluating
from lit_adv.draws import Draws
from lit_adv.inputs import check_images
from lit_adv.models.frozen import Folded
from lit_adv.response import Response, answered


class Images(Protocol):
    """Images (n, C, H, W) in [0, 1] and their true labels (n,)."""

    @property
    def image(self) -> Tensor: ...
    @property
    def label(self) -> Tensor: ...


class Detector(nn.Module, ABC):
    """Scores images by suspicion; what it learns, it learns from training images alone.

    What was learnt lies in parameters and buffers, so that a state dictionary holds all of it. The classifier is
    frozen and always in eval mode; None where a detector looks at the image alone.

    Args:
        classifier: the network it protects, images (n, C, H, W) in [0, 1] to logits (n, K).

    Attributes:
        stochastic: the score draws fresh random numbers; then ``score`` takes ``draws``, one row per image.
    """

    stochastic: bool = False

    def __init__(self, classifier: nn.Module | None) -> None:
        super().__init__()
        self.classifier = classifier
        self._folded = Folded()
        if classifier is not None:
            classifier.eval().requires_grad_(False)

    @abstractmethod
    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Suspicion of each image, (n,): larger for those more likely adversarial.

        Shape: x (n, C, H, W) in [0, 1].
        """

    def fit(self, training: Images, clean: Tensor, x_adv: Tensor) -> None:
        """Learn what is to be learnt; by default nothing.

        Args:
            training: clean training images with their true labels.
            clean, x_adv: training images that the classifier gets right, (m, C, H, W), and adversarial images made
                of them, row by row.

        Raises:
            ValueError: nothing to learn from, or NaN in it.
        """
        return

    def respond(self, x: Tensor) -> Response:
        """What the classifier says of images.

        Raises:
            ValueError: no classifier; images of another rank, with NaN or far outside [0, 1]. TypeError: whole numbers.
        """
        if self.classifier is None:
            raise ValueError(f"{type(self).__name__} has no classifier to ask: give one")
        check_images(x)
        return Response(self._folded(self.classifier), x)

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; the classifier stays in eval mode."""
        super().train(mode)
        if self.classifier is not None:
            self.classifier.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether the detector's own weights collect gradients; the classifier's never do."""
        super().requires_grad_(requires_grad)
        if self.classifier is not None:
            self.classifier.requires_grad_(False)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take buffers of a size that is known only after fitting."""
        for name, own in list(self.named_buffers(recurse=False)):
            there = state_dict.get(prefix + name)
            if isinstance(there, Tensor) and there.shape != own.shape:
                setattr(self, name, own.new_empty(there.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class NetworkDetector(Detector, ABC):
    """A network of two outputs (benign z+, adversarial z-) over a view of the image; its score is the margin z- - z+.

    An image is adversarial where the margin is positive, benign where it is 0: p- = sigmoid(margin). Differentiable in
    the image, through the view too.

    Args:
        classifier: the network it protects. network: from the view to two logits; it is what is trained.
    """

    def __init__(self, classifier: nn.Module, network: nn.Module) -> None:
        super().__init__(classifier)
        outputs = getattr(network, "num_classes", 2)
        if outputs != 2:
            raise ValueError(f"network must have two outputs, benign and adversarial, got num_classes={outputs}")
        self.network = network
        self.num_classes = 2

    @abstractmethod
    def view(self, response: Response) -> Tensor:
        """What the network looks at, with the response's graph if it has one."""

    def calibrate(self, clean: Iterable[Tensor], adversarial: Iterable[Tensor] = ()) -> None:
        """Learn the scale of the view from batches of training images; default: nothing."""
        return

    def judge(self, view: Tensor) -> Tensor:
        """Margins (n,) of views, in float32 at least."""
        scores = answered(self.network, view)
        if scores.dim() != 2 or scores.shape[1] != 2:
            raise ValueError(f"network must return two logits per image, (n, 2), got shape {tuple(scores.shape)}")
        return scores[:, 1] - scores[:, 0]

    def margin(self, x: Tensor) -> Tensor:
        """Positive where an image looks adversarial, (n,)."""
        return self.judge(self.view(self.respond(x)))

    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        return self.margin(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 2): benign and adversarial."""
        return answered(self.network, self.view(self.respond(x)))


def scores(detector: Detector, x: Tensor, chunk: int = 256, index: Tensor | None = None, seed: int = 0) -> Tensor:
    """Scores (n,) of many images, ``chunk`` at a time, on the CPU in float64, of the detector in eval mode.

    Args:
        index: places in the data set, which key a random detector's draws; default ``arange(n)``.

    Raises:
        ValueError: NaN among the scores.
    """
    index = torch.arange(len(x)) if index is None else index.cpu()
    parts = []
    for rows in torch.split(torch.arange(len(x)), chunk):
        draws = Draws(seed, index[rows].to(x.device), torch.zeros_like(rows).to(x.device), key=-13)
        given = {"draws": draws} if detector.stochastic else {}
        with torch.no_grad(), evaluating(detector):
            parts.append(detector.score(x[rows], **given).double().cpu())
    found = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    if found.isnan().any():
        raise ValueError(
            f"{type(detector).__name__} scores {int(found.isnan().sum())} of {len(x)} images with NaN: its weights or "
            "the classifier's gradients are not finite"
        )
    return found
