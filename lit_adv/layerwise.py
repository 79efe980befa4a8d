"""Detectors that score an image layer by layer: a logistic regression, fitted to pairs, makes one score of them."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_adv.detector import Detector, Images
from lit_adv.draws import Draws
from lit_adv.features import check_layers, inner_layers
from lit_adv.inputs import check_images, precise, wide

_NOISE = -17  # key of the noisy images, apart from other draws
_CHUNK = 256  # images in a forward while fitting
_HALVINGS = 40  # of the interval that holds the noise's scale; float32 images know no more


class Layerwise(Detector):
    """Scores of several inner layers, one setting of which is chosen, combined by a logistic regression.

    Of each pair a triple is made: clean image, noisy image at the same l2 distance as the adversarial one, adversarial
    image. Those count whose noise leaves the classifier's decision as it was and whose attack changes it. Every other
    triple fits the regression (adversarial 1, clean and noisy 0) for each setting, the rest choose the setting by AUC.
    Scores are standardised before the regression, which has scikit-learn's default penalty; the published codes choose
    the penalty by cross-validation, and do not all standardise.

    Args:
        classifier: the network it protects.
        settings: values of the one number that is chosen by AUC.
        layers: names of the layers, as in ``classifier.named_modules()``; None: every pooling and every hidden linear
            layer (of a VGG: every stage).
        seed: of the noise.
        noisy: whether noisy images count as benign, as published. Where noise looks odder than an attack, as on the
            black ground of digits, no linear rule finds the attack then; False: clean against adversarial alone.

    Attributes:
        chosen: the setting that was chosen. aucs: AUC of each setting on the triples that choose.
        triples: number of triples that counted.
        coefficients: of the layers' scores, (L,); empty until fitted. intercept: what is added.
    """

    chosen: Tensor
    aucs: Tensor
    triples: Tensor
    coefficients: Tensor
    intercept: Tensor
    classifier: nn.Module

    def __init__(
        self,
        classifier: nn.Module,
        settings: Sequence[float],
        layers: Sequence[str] | None = None,
        seed: int = 0,
        noisy: bool = True,
    ) -> None:
        super().__init__(classifier)
        self.layers = inner_layers(classifier) if layers is None else tuple(layers)
        check_layers(classifier, self.layers)
        self.settings, self.seed, self.noisy = tuple(settings), seed, noisy
        # folding a batch norm into a convolution changes what the convolution itself gives
        modules = dict(classifier.named_modules())
        self._exact = any(isinstance(modules[name], nn.Conv2d) for name in self.layers)
        self.register_buffer("triples", torch.zeros((), dtype=torch.int64))
        for name in ("chosen", "intercept"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        for name in ("aucs", "coefficients"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    @property
    def network(self) -> nn.Module:
        """The classifier, or its cheaper copy with the same layers."""
        return self.classifier if self._exact else self._folded(self.classifier)

    @abstractmethod
    def learn(self, training: Images, clean: Tensor) -> None:
        """Learn what the layers' scores need from clean training images; ``clean`` are those of the pairs."""

    @abstractmethod
    def layer_scores(self, x: Tensor, settings: Sequence[float]) -> Tensor:
        """Float64 scores (n, len(settings), L) of the layers; with a graph where the images have one."""

    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """The regression's logit, float64: p(adversarial) is its sigmoid."""
        if not len(self.coefficients):
            raise ValueError(
                f"{type(self).__name__} has learnt nothing yet: call fit(training, clean, x_adv), or read a fitted "
                "detector's state"
            )
        check_images(x)
        if not len(x):
            return x.new_zeros(0, dtype=torch.float64)
        graph = x.requires_grad and torch.is_grad_enabled()
        with precise(x), torch.set_grad_enabled(graph):
            found = self.layer_scores(wide(x.clone() if x.is_inference() else x), [float(self.chosen)])[:, 0]
            return (found * self.coefficients).sum(1) + self.intercept

    def fit(self, training: Images, clean: Tensor, x_adv: Tensor) -> None:
        """Learn the layers' statistics from ``training``, setting and regression from the pairs.

        Raises:
            ValueError: nothing to learn from, NaN or images of other shapes in it, fewer than two classes, or fewer
                than two pairs in which the attack alone changes the decision.
        """
        check_fit(training, clean, x_adv)
        with precise(clean), torch.no_grad():
            clean, x_adv = wide(clean).clone(), wide(x_adv).clone()
            self.learn(training, clean)
            index = torch.arange(len(clean), device=clean.device)
            noisy = noisy_like(clean, x_adv, Draws(self.seed, index, torch.zeros_like(index), _NOISE))
            told = [self._labels(images) for images in (clean, noisy, x_adv)]
            kept = ((told[1] == told[0]) | (not self.noisy)) & (told[2] != told[0])
            kept = kept.nonzero().squeeze(1)
            if len(kept) < 2:
                raise ValueError(
                    f"of {len(clean)} pairs, the attack changes the classifier's decision and noise of the same size "
                    f"does not in {len(kept)}, and 2 are the least: give more adversarial images that fool it"
                )
            found = [self._many(images[kept]) for images in (clean, noisy, x_adv)]
            self.triples.fill_(len(kept))
            self._choose(torch.stack(found))

    def _choose(self, found: Tensor) -> None:
        """Fit one regression per setting and keep the best; found (3, m, S, L) of clean, noisy, adversarial images."""
        from sklearn.metrics import roc_auc_score  # slow to import, and few need it

        found = found if self.noisy else found[[0, 2]]
        truth = [0, 0, 1] if self.noisy else [0, 1]
        y = torch.tensor(truth, device=found.device)[:, None].expand(found.shape[:2])
        fitted, aucs = [], []
        for scores in found.unbind(2):
            weights = regression(scores[:, ::2].flatten(0, 1), y[:, ::2].flatten())
            told = scores[:, 1::2].flatten(0, 1) @ weights[:-1]
            aucs.append(roc_auc_score(y[:, 1::2].flatten().cpu().numpy(), told.cpu().numpy()))
            fitted.append(weights)
        best = max(range(len(aucs)), key=lambda place: aucs[place])  # the first of the best
        self.aucs = torch.tensor(aucs, dtype=torch.float64, device=found.device)
        self.chosen.fill_(self.settings[best])
        self.coefficients = fitted[best][:-1].clone()
        self.intercept = fitted[best][-1].clone()

    def _labels(self, x: Tensor) -> Tensor:
        return torch.cat([self.respond(part).label for part in torch.split(x, _CHUNK)])

    def _many(self, x: Tensor) -> Tensor:
        found = torch.cat([self.layer_scores(part, self.settings) for part in torch.split(x, _CHUNK)])
        if not found.isfinite().all():
            raise ValueError("the layers' scores of the pairs hold NaN or inf: mend the classifier's weights")
        return found


def regression(scores: Tensor, y: Tensor) -> Tensor:
    """Logistic regression on standardised scores, (m, L): coefficients of the plain scores and intercept, (L + 1,).

    A score that is constant gets the coefficient 0.

    Raises:
        ValueError: the fit does not converge.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression  # slow to import, and few need it

    mean, spread = scores.mean(0), scores.std(0, correction=0)
    flat = spread <= 1e-12 * mean.abs().clamp_min(1e-300)
    spread = spread.masked_fill(flat, 1.0)
    scaled = ((scores - mean) / spread).masked_fill(flat, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model = LogisticRegression(max_iter=10_000).fit(scaled.cpu().numpy(), y.cpu().numpy())
        except ConvergenceWarning as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the layers' regression does not converge ({reason}): give more pairs") from None
    slope = torch.from_numpy(model.coef_[0]).to(scores).masked_fill(flat, 0.0) / spread
    return torch.cat([slope, torch.from_numpy(model.intercept_).to(scores) - (slope * mean).sum()])


def noisy_like(clean: Tensor, x_adv: Tensor, draws: Draws) -> Tensor:
    """Clean images with normal noise, clipped to [0, 1], as far off in l2 as the adversarial images.

    The noise is scaled so that the distance is met after clipping; where clipping allows no such distance (beyond some
    0.7 of all pixels at their farthest), with a noise of many times the range.

    Shape: (n, C, H, W) each.
    """
    noise = draws.normal(*clean.shape[1:], dtype=clean.dtype)
    wanted = (x_adv - clean).flatten(1).double().norm(dim=1)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 64.0)
    for _ in range(_HALVINGS):  # the distance grows with the scale
        scale = (low + high) / 2
        far = (_noised(clean, noise, scale) - clean).flatten(1).double().norm(dim=1) > wanted
        low, high = torch.where(far, low, scale), torch.where(far, scale, high)
    return _noised(clean, noise, low)


def _noised(clean: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
    return (clean + noise * scale.to(clean.dtype)[:, None, None, None]).clamp(0, 1)


def check_fit(training: Images, clean: Tensor, x_adv: Tensor) -> None:
    """Refuse what nothing can be learnt from.

    Raises:
        ValueError: naming the argument and the remedy.
    """
    image, label = training.image, training.label
    if not len(image) or not len(clean):
        raise ValueError(
            f"there must be training images and pairs to learn from, got {len(image)} and {len(clean)}: attack "
            "training images that the classifier gets right"
        )
    for images in (image, clean, x_adv):
        check_images(images)
    if clean.shape != x_adv.shape or clean.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"clean and x_adv must be pairs of images like the training images {tuple(image.shape[1:])}, got "
            f"{tuple(clean.shape)} and {tuple(x_adv.shape)}"
        )
    if label.shape != (len(image),) or label.is_floating_point():
        raise ValueError(
            f"training.label must hold one class index per image, shape ({len(image)},), got {tuple(label.shape)} of "
            f"{label.dtype}"
        )
    if len(torch.unique(label)) < 2:
        raise ValueError("training.label holds a single class: give training images of all classes")
