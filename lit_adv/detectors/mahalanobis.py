"""DET_MDS: how far an image's features lie from those of every class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_adv.detector import Images
from lit_adv.features import features, features_of_many
from lit_adv.layerwise import Layerwise

EPS = (0.0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01)
_ROUNDING = 1e-12  # of the largest variance: what a float32 network computes is no more exact than that


class Mahalanobis(Layerwise):
    """Each layer's score is minus half the squared Mahalanobis distance to the nearest class mean, after a small step.

    Features are the spatial means of a layer's maps. Each class has its mean, all share one covariance, whose
    pseudo-inverse is taken: directions without variance do not count. Before a layer's score is taken, the image
    moves by ``eps`` along the sign of that score's gradient, towards the nearest class; it is not clipped to [0, 1].
    The regression learns how the layers' scores count; see :class:`~lit_adv.layerwise.Layerwise`.

    Differentiable in the image, the small step counting as a constant.

    Args:
        classifier: the network it protects.
        eps: sizes of the small step in pixel units that are tried; at least 0.
        layers, noisy: see :class:`~lit_adv.layerwise.Layerwise`. seed: of the noisy images.

    Attributes:
        classes: labels that have a mean, (K,): those with training images.
        ranks: of each layer's covariance, (L,).

    Raises:
        ValueError: a size that is negative or not finite; asked before it was fitted; see ``fit``.
    References:
        Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
        Attacks", https://arxiv.org/abs/1807.03888, sections 2.1 and 2.2.
    """

    classes: Tensor
    ranks: Tensor

    def __init__(
        self,
        classifier: nn.Module,
        eps: Sequence[float] = EPS,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        noisy: bool = True,
    ) -> None:
        if not eps or not all(0 <= one < 1 for one in eps):
            raise ValueError(f"eps must hold sizes in [0, 1) in pixel units, one at least, got {list(eps)}")
        super().__init__(classifier, eps, layers, seed, noisy)
        for name in ("classes", "ranks"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        for number in range(len(self.layers)):
            self.register_buffer(f"whitening_{number}", torch.empty(0, 0, dtype=torch.float64))
            self.register_buffer(f"means_{number}", torch.empty(0, 0, dtype=torch.float64))

    def learn(self, training: Images, clean: Tensor) -> None:
        """Class means by true label, and the whitening of the common covariance, of every layer."""
        classes, place = torch.unique(training.label.to(training.image.device), return_inverse=True)
        known = getattr(self.classifier, "num_classes", len(classes))
        if len(classes) < known:
            warnings.warn(
                f"training images show {len(classes)} of {known} classes: those of the others will look adversarial",
                stacklevel=3,
            )
        ranks = []
        for number, h in enumerate(features_of_many(self.network, self.layers, training.image)):
            if not h.isfinite().all():
                raise ValueError(
                    f"layer {self.layers[number]!r} gives NaN or inf for training images: mend the classifier's weights"
                )
            means = class_means(h, place, len(classes))
            matrix = whitening(h - means[place])
            ranks.append(matrix.shape[1])
            setattr(self, f"whitening_{number}", matrix)
            setattr(self, f"means_{number}", means)
        self.classes, self.ranks = classes, torch.tensor(ranks, device=classes.device)

    def confidence(self, number: int, h: Tensor) -> Tensor:
        """Minus half the squared distance of layer ``number``'s features (n, d) to the nearest class mean, (n,)."""
        means, matrix = getattr(self, f"means_{number}"), getattr(self, f"whitening_{number}")
        h, middle = h.to(means.dtype), means.mean(0)
        with torch.no_grad():  # (n, K), not (n, K, d); not by matrix products, which lose the small distances
            images, classes = ((points - middle) @ matrix for points in (h, means))
            away = torch.cdist(images, classes, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = away.argmin(1)  # of equally near classes the first, gradient and all
        return -((h - means[nearest]) @ matrix).square().sum(1) / 2

    def layer_scores(self, x: Tensor, settings: Sequence[float]) -> Tensor:
        graph = x.requires_grad and torch.is_grad_enabled()
        moves = any(settings)
        leaf = x if graph or not moves else x.detach().requires_grad_()
        with torch.set_grad_enabled(graph or moves):
            found = features(self.network, self.layers, leaf)
            plain = [self.confidence(number, h) for number, h in enumerate(found)]
        layers = []
        for number, score in enumerate(plain):
            towards = None
            if moves:
                last = number == len(plain) - 1
                (slope,) = torch.autograd.grad(score, leaf, torch.ones_like(score), retain_graph=graph or not last)
                towards = slope.nan_to_num(0, 0, 0).sign()
            layers.append([self._moved(number, x, score, towards, eps) for eps in settings])
        stacked = torch.stack([torch.stack(columns, 1) for columns in layers], 2)
        return stacked if graph else stacked.detach()

    def _moved(self, number: int, x: Tensor, score: Tensor, towards: Tensor | None, eps: float) -> Tensor:
        """A layer's score after a step of ``eps``."""
        if towards is None or eps == 0:
            return score
        (h,) = features(self.network, self.layers[number : number + 1], x + eps * towards)
        return self.confidence(number, h)


def class_means(h: Tensor, place: Tensor, classes: int) -> Tensor:
    """Mean features of each class, (classes, d), none of which is empty."""
    total = h.new_zeros(classes, h.shape[1]).index_add_(0, place, h)
    return total / place.bincount(minlength=classes)[:, None]


def whitening(centred: Tensor) -> Tensor:
    """W (d, rank) with W W' the pseudo-inverse of the covariance of centred features (n, d)."""
    covariance = centred.T @ centred / len(centred)
    variance, direction = torch.linalg.eigh(covariance)
    kept = variance > max(_ROUNDING, len(variance) * torch.finfo(variance.dtype).eps) * variance[-1].clamp_min(1e-300)
    return direction[:, kept] * variance[kept].rsqrt()
