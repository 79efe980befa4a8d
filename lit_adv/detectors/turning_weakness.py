"""DET_TWS: how the classifier answers to noise, and how many steps change its mind."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_adv.answers import dtype_of
from lit_adv.detector import Detector, Images
from lit_adv.draws import Draws, fresh_draws
from lit_adv.inputs import check_images, precise, wide

_CALIBRATION = -19  # key of the draws for clean images, apart from those of scored ones
_CHUNK = 256  # images that step together while fitting


class TurningWeakness(Detector):
    """Natural images bear noise and yield to gradient steps; adversarial images lack one or the other.

    Three statistics, larger for adversarial images:

    * C1: l1 distance of the probabilities at x and at x + sigma z, z one standard normal draw, not clipped; in [0, 2].
    * C2t: steps of gradient descent on the cross-entropy of one random other class until the decision changes,
      whatever to. The gradient itself is followed, not its sign; each step is clipped to [0, 1] and to the l-infinity
      ball around x.
    * C2u: the same with ascent on the cross-entropy of the class decided for.

    The score is the largest of the three ranks among clean training images, each the share of those with a *smaller*
    statistic. So an image scores at least q exactly if a statistic exceeds its threshold, the q-quantile of the clean
    ones: sweeping the score sweeps the paper's rule "adversarial if any exceeds" along one common quantile. Ties
    (counts of steps, above all at the most that are made) therefore count for the image.

    The paper has no settings for MNIST: the defaults are ours. Its own (``sigma``, ``targeted_step_size``,
    ``targeted_eps``, ``untargeted_step_size``, ``untargeted_eps``) are 0.1, 0.005, 0.03, 0.1 (3 for Inception), 0.03
    for ImageNet and 0.01, 5e-4, 0.5, 1, 0.5 for CIFAR-10.

    Args:
        classifier: the network it protects.
        sigma: standard deviation of the noise in pixel units, positive.
        targeted_step_size: of C2t, times the gradient; positive. targeted_eps: radius of its ball in pixel units.
        untargeted_step_size: of C2u. untargeted_eps: radius of its ball.
        targeted_steps: most steps of C2t. untargeted_steps: most steps of C2u; an image that needs them all counts as
            many as one that would need more.
        calibration: most clean training images to rank among, the first that the classifier gets right.
        seed: of the calibration's random numbers.

    Attributes:
        calibrated: each statistic of the clean images in ascending order, (N, 3); empty until fitted.

    Raises:
        ValueError: an argument out of its range; asked before it was fitted; when fitted, nothing to learn from.
    References:
        Hu et al. 2019, "A New Defense Against Adversarial Images: Turning a Weakness into a Strength",
        https://arxiv.org/abs/1910.07629, criteria 1 and 2, algorithms 1 and 2.
    """

    stochastic = True
    calibrated: Tensor
    classifier: nn.Module

    def __init__(
        self,
        classifier: nn.Module,
        sigma: float = 0.1,
        targeted_step_size: float = 0.05,
        targeted_eps: float = 0.3,
        untargeted_step_size: float = 1.0,
        untargeted_eps: float = 0.3,
        targeted_steps: int = 200,
        untargeted_steps: int = 1000,
        calibration: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(classifier)
        self.sigma, self.calibration, self.seed = sigma, calibration, seed
        self.targeted_step_size, self.targeted_eps = targeted_step_size, targeted_eps
        self.untargeted_step_size, self.untargeted_eps = untargeted_step_size, untargeted_eps
        self.targeted_steps, self.untargeted_steps = targeted_steps, untargeted_steps
        for name in ("sigma", "targeted_step_size", "targeted_eps", "untargeted_step_size", "untargeted_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        for name in ("targeted_steps", "untargeted_steps", "calibration"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value}")
        self.register_buffer("calibrated", torch.empty(0, 3, dtype=torch.float64))

    def statistics(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """C1, C2t and C2u of each image, (n, 3) float64.

        Args:
            draws: of the noise and of the random classes, one row per image; None: from torch's generator.
        """
        check_images(x)
        with precise(x), torch.no_grad():
            x = wide(x.detach().clone() if x.is_inference() else x.detach())
            draws = fresh_draws(x) if draws is None else draws
            noise = draws.normal(*x.shape[1:], dtype=x.dtype)
            logits = self._ask(x)
            label = logits.argmax(1)
            other = draws.integers(logits.shape[1] - 1, 1).squeeze(1)
            target = other + (other >= label)
            far = self._ask(x + self.sigma * noise).double().softmax(1) - logits.double().softmax(1)
            targeted = self._steps(x, label, target, -self.targeted_step_size, self.targeted_eps, self.targeted_steps)
            untargeted = self._steps(
                x, label, label, self.untargeted_step_size, self.untargeted_eps, self.untargeted_steps
            )
        return torch.stack([far.abs().sum(1), targeted.double(), untargeted.double()], 1)

    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """The largest rank of the three, (n,) float64 in [0, 1]; without a gradient."""
        if not len(self.calibrated):
            raise ValueError(
                "TurningWeakness has learnt nothing yet: call fit(training, clean, x_adv), or read a fitted "
                "detector's state"
            )
        return ranks(self.statistics(x, draws), self.calibrated).amax(1)

    def fit(self, training: Images, clean: Tensor | None = None, x_adv: Tensor | None = None) -> None:
        """Take the statistics of clean training images that the classifier gets right; pairs are not looked at.

        Raises:
            ValueError: NaN among the images, or none that the classifier gets right.
        """
        check_images(training.image)
        image, label = training.image, training.label.to(training.image.device)
        if label.shape != (len(image),) or label.is_floating_point():
            raise ValueError(
                f"training.label must hold one class index per image, shape ({len(image)},), got {tuple(label.shape)} "
                f"of {label.dtype}"
            )
        right: list[Tensor] = []
        found = 0
        for rows in torch.split(torch.arange(len(image), device=image.device), _CHUNK):
            if found >= self.calibration:
                break
            right.append(rows[self.respond(image[rows]).label == label[rows]])
            found += len(right[-1])
        if not found:
            raise ValueError(
                f"the classifier gets none of the {len(image)} training images right: give images with true labels"
            )
        parts = []
        for rows in torch.split(torch.cat(right)[: self.calibration], _CHUNK):
            draws = Draws(self.seed, rows, torch.zeros_like(rows), _CALIBRATION)
            parts.append(self.statistics(image[rows], draws))
        statistics = torch.cat(parts)
        if statistics.isnan().any():
            raise ValueError("the classifier answers clean training images with NaN: mend its weights")
        self.calibrated = statistics.sort(0).values

    def _ask(self, x: Tensor) -> Tensor:
        """Logits (n, K) in float32 at least."""
        network = self._folded(self.classifier)
        logits: Tensor = wide(network(x.to(dtype_of(network) or x.dtype)))
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"the classifier must return logits (n, K >= 2), got shape {tuple(logits.shape)}")
        return logits

    def _steps(self, x0: Tensor, label: Tensor, goal: Tensor, step_size: float, eps: float, most: int) -> Tensor:
        """Steps along the gradient of the cross-entropy of ``goal`` until the decision is not ``label``, (n,) int64.

        Rows that have changed leave, and so do those that stand still, for they would do so for ever.
        """
        counts = torch.full_like(label, most)
        rows = torch.arange(len(x0), device=x0.device)
        low, high, x = (x0 - eps).clamp_min(0), (x0 + eps).clamp_max(1), x0
        for number in range(most):
            if not len(rows):
                break
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = self._ask(leaf)
            changed = (logits.detach().argmax(1) != label) if number else torch.zeros_like(rows, dtype=torch.bool)
            counts[rows[changed]] = number
            (slope,) = torch.autograd.grad(logits, leaf, _towards(logits.detach(), goal))
            x = torch.clamp(leaf.detach() + step_size * slope.nan_to_num(0, 0, 0), low, high)
            going = (~changed & (x != leaf).flatten(1).any(1)).nonzero().squeeze(1)
            if len(going) < len(rows):
                rows, label, goal = rows[going], label[going], goal[going]
                x, low, high = x[going], low[going], high[going]
        return counts


def ranks(statistics: Tensor, calibrated: Tensor) -> Tensor:
    """Share of the calibration's values, sorted (N, s), that are smaller than each statistic, (n, s)."""
    columns = [
        torch.searchsorted(own.contiguous(), value.contiguous())
        for own, value in zip(calibrated.unbind(1), statistics.unbind(1), strict=True)
    ]
    return torch.stack(columns, 1).double() / len(calibrated)


def _towards(logits: Tensor, goal: Tensor) -> Tensor:
    """Gradient of the cross-entropy of ``goal`` with respect to the logits: p minus one at the goal.

    There it is minus the sum of the others, which does not cancel where the classifier is sure.
    """
    weight = logits.softmax(1).scatter(1, goal[:, None], 0.0)
    return weight.scatter(1, goal[:, None], -weight.sum(1, keepdim=True))
