"""DET_sal: a network that looks at the image and at where the classifier's decision hangs on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_adv.detector import NetworkDetector
from lit_adv.response import Response


class SaliencyDetector(NetworkDetector):
    """Looks at the image with one more channel: the saliency of the predicted class, scaled to [0, 1] in each image.

    The scaling takes the magnitude out, which is what :class:`SensitivityDetector` goes by.

    Args:
        classifier: the network it protects.
        network: (n, C + 1, H, W) to two logits.

    References:
        Zhang, Yang & Ye 2018, https://arxiv.org/abs/1803.08773; the paper names saliency maps alone, so that the map
        is that of Simonyan et al. 2014, https://arxiv.org/abs/1312.6034, is a choice of ours.
    """

    def __init__(self, classifier: nn.Module, network: nn.Module) -> None:
        super().__init__(classifier, network)

    def view(self, response: Response) -> Tensor:
        saliency = response.saliency
        low = saliency.amin((1, 2, 3), keepdim=True)
        spread = saliency.amax((1, 2, 3), keepdim=True) - low
        return torch.cat([response.x, (saliency - low) / spread.clamp_min(1e-30)], 1)
