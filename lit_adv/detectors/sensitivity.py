"""DET_IS: a network that looks at how sensitive the classifier is to each pixel; and the sensitivity itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from lit_adv.detector import Detector, NetworkDetector
from lit_adv.draws import Draws
from lit_adv.response import Response

Scaling = Literal["rms", "signed_log", "none", "image"]
SCALINGS = ("rms", "signed_log", "none", "image")
_ENOUGH = 2**24  # entries of maps that a quantile is taken of


class SensitivityDetector(NetworkDetector):
    """Looks at the gradient map of the classifier's cross-entropy at its predicted label.

    Minimum-norm l2 attacks stop just over the boundary, where the map is large; where the classifier is sure, it
    vanishes. The paper says nothing of how the map is scaled before a network sees it:

    * ``rms``: over one number per detector, the root mean square of all entries of the training maps; keeps the
      magnitude, which is what tells.
    * ``signed_log``: ``sign(g) log(1 + |g| / tau)``, tau the 0.9-quantile of |g| of the clean training maps, or of the
      first of them, some 2^24 entries;
      for deep networks, whose maps span many decades.
    * ``none``: as they are.
    * ``image``: each map over its own root mean square, which removes the magnitude: an ablation.

    Args:
        classifier: the network it protects.
        network: gradient maps (n, C, H, W) to two logits.
        scaling: see above.

    Attributes:
        scale: the number that ``rms`` or ``signed_log`` divides by; 0 until calibrated, 1 where all maps vanish.

    Raises:
        ValueError: an unknown scaling; asked before it was calibrated.
    References:
        Li et al. 2020, "Are L2 adversarial examples intrinsically different?", equations (7) and (8).
    """

    scale: Tensor

    def __init__(self, classifier: nn.Module, network: nn.Module, scaling: Scaling = "rms") -> None:
        super().__init__(classifier, network)
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
        self.scaling = scaling
        self.register_buffer("scale", torch.zeros((), dtype=torch.float64))

    def view(self, response: Response) -> Tensor:
        gradient = response.gradient
        if self.scaling == "none":
            return gradient
        if self.scaling == "image":
            entries = math.sqrt(gradient[0].numel() if len(gradient) else 1)
            size = (gradient.flatten(1).double().norm(dim=1) / entries).to(gradient.dtype)  # squares vanish in float32
            return gradient / size.clamp_min(1e-30)[:, None, None, None]
        if not self.scale:
            raise ValueError(
                f"the detector's scaling {self.scaling!r} has not been calibrated: call calibrate(clean, "
                "adversarial) with training images, train it, or read a checkpoint of a trained one"
            )
        scaled = gradient / self.scale.to(gradient.dtype)
        return scaled if self.scaling == "rms" else scaled.sign() * scaled.abs().log1p()

    @torch.no_grad()
    def calibrate(self, clean: Iterable[Tensor], adversarial: Iterable[Tensor] = ()) -> None:
        """Fit the scale to batches of training images: ``rms`` to all of them, ``signed_log`` to the clean ones.

        Raises:
            ValueError: no image, or gradient maps with NaN or inf.
        """
        if self.scaling == "rms":
            squares, entries = 0.0, 0
            for x in chain(clean, adversarial):
                gradient = self._map(x)
                squares, entries = squares + float(gradient.square().sum()), entries + gradient.numel()
            found = math.sqrt(squares / max(entries, 1))
        elif self.scaling == "signed_log":
            sizes: list[Tensor] = []
            entries = 0
            for x in clean:
                sizes.append(self._map(x).abs().flatten().cpu())
                entries += sizes[-1].numel()
                if entries > _ENOUGH:
                    break
            every = torch.cat(sizes) if sizes else torch.zeros(0)
            found = float(every.kthvalue(math.ceil(0.9 * len(every))).values) if len(every) else 0.0
        else:
            return
        if not entries:
            raise ValueError("there are no training images to calibrate the gradient maps' scale on")
        self.scale.fill_(found or 1.0)

    def _map(self, x: Tensor) -> Tensor:
        """Gradient maps in float64; refused where they are not finite."""
        gradient = self.respond(x).gradient.double()
        broken = int((~gradient.isfinite()).flatten(1).any(1).sum())
        if broken:
            raise ValueError(
                f"the classifier's gradient maps hold NaN or inf for {broken} of {len(x)} training images: mend its "
                "weights, or leave those images out"
            )
        return gradient


class InputSensitivity(Detector):
    """Ranks images by the logarithm of their input sensitivity alone: nothing is trained.

    Args:
        classifier: the network it protects.

    References:
        Li et al. 2020, equation (1).
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__(classifier)

    def score(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        return log_sensitivity(self.respond(x))


def log_sensitivity(response: Response) -> Tensor:
    """log10 of the input sensitivity, (n,); at least -30, where the gradient vanishes."""
    return response.sensitivity.clamp_min(1e-30).log10()
