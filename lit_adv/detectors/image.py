"""DET_org: a network that looks at the image itself."""

from __future__ import annotations

from torch import Tensor

from lit_adv.detector import NetworkDetector
from lit_adv.response import Response


class ImageDetector(NetworkDetector):
    """Tells adversarial images from clean ones by their pixels; meant for attacks within an l-infinity ball.

    Args:
        classifier: the network it protects; not asked, but kept, so that one detector serves one classifier.
        network: images (n, C, H, W) to two logits.

    References:
        Gong, Wang & Ku 2017, https://arxiv.org/abs/1704.04960; DET_org of Li et al. 2020, "Are L2 adversarial examples
        intrinsically different?".
    """

    def view(self, response: Response) -> Tensor:
        return response.x
