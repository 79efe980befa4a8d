"""DET_sal: a network that looks at the image and at where the classifier's decision hangs on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.detector import NetworkDetector
from lit_adv.inputs import precise
from lit_adv.response import Response, answered


class SaliencyDetector(NetworkDetector):
    """Looks at the image with one more channel: the saliency of the predicted class, scaled to [0, 1] in each image.

    The scaling takes the magnitude out, which is what :class:`SensitivityDetector` goes by.

    Args:
        classifier: the network it protects.
        network: (n, C + 1, H, W) to two logits.
        layer: name of an inner layer of the classifier, as in ``named_modules()``, that gives maps (n, c, h, w): the
            saliency is that layer's, by Grad-CAM, brought to the image's size; None: that of the image's own values.

    Raises:
        ValueError: no such layer; when asked, one that gives no maps.
    References:
        Zhang, Yang & Ye 2018, https://arxiv.org/abs/1803.08773: the original and its saliency map. Which map is not
        told: that of Simonyan et al. 2014, https://arxiv.org/abs/1312.6034, is a choice of ours, and so is that of
        Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, for the "interior layers" of Li et al. 2020.
    """

    classifier: nn.Module

    def __init__(self, classifier: nn.Module, network: nn.Module, layer: str | None = None) -> None:
        super().__init__(classifier, network)
        names = [name for name, _ in classifier.named_modules() if name]
        if layer is not None and layer not in names:
            raise ValueError(f"layer must be one of the classifier's {', '.join(names)}, got {layer!r}")
        self.layer = layer

    def view(self, response: Response) -> Tensor:
        saliency = response.saliency if self.layer is None else self._inner(response, self.layer)
        low = saliency.amin((1, 2, 3), keepdim=True)
        spread = saliency.amax((1, 2, 3), keepdim=True) - low
        return torch.cat([response.x, (saliency - low) / spread.clamp_min(1e-30)], 1)

    def _inner(self, response: Response, layer: str) -> Tensor:
        """Grad-CAM of the predicted class at a layer, (n, 1, H, W)."""
        maps: list[Tensor] = []
        module = dict(self.classifier.named_modules())[layer]  # of the classifier itself: a folded copy's may differ
        hook = module.register_forward_hook(lambda _module, _given, told: maps.append(told))
        try:
            with precise(response.x):
                leaf = response.x if response.graph else response.x.detach().requires_grad_()
                logits = answered(self.classifier, leaf)
        finally:
            hook.remove()
        if len(maps) != 1 or maps[0].dim() != 4:
            shapes = [tuple(told.shape) for told in maps]
            raise ValueError(f"layer {layer!r} must give maps (n, c, h, w), once a forward, got {shapes}: name another")
        with precise(response.x):
            own = logits.gather(1, logits.detach().argmax(-1, keepdim=True)).sum()
            (slope,) = torch.autograd.grad(own, maps[0], create_graph=response.graph)
            seen = F.relu((slope.mean((2, 3), keepdim=True) * maps[0]).sum(1, keepdim=True)).to(response.x.dtype)
            seen = F.interpolate(seen, response.x.shape[-2:], mode="bilinear", align_corners=False)
        return seen if response.graph else seen.detach()
