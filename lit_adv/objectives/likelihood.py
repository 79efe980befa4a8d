"""Training a density of images by maximum likelihood."""

import math

from torch import Tensor, nn

from lit_adv.objectives.objective import LabelledImages, Objective


class MaximumLikelihood(Objective):
    """Minus the log-likelihood of clean images, in bits per value, so that images of all sizes are on one scale.

    The model answers log-probabilities (n,) in nats, as a ``PixelCNN`` does.
    """

    def __call__(self, model: nn.Module, batch: LabelledImages) -> tuple[Tensor, dict[str, Tensor]]:
        bits = bits_per_dim(model(batch.image), batch.image)
        return bits.mean(), {}


def bits_per_dim(log_prob: Tensor, image: Tensor) -> Tensor:
    """Bits that each value of an image takes to store.

    Shape:
        log_prob (n,) in nats, image (n, C, H, W) -> (n,)

    Raises:
        ValueError: If the model has answered anything but one number per image.
    """
    if log_prob.shape != image.shape[:1]:
        raise ValueError(
            f"the model must answer one log-probability per image, {tuple(image.shape[:1])}, got shape "
            f"{tuple(log_prob.shape)}: train a density, e.g. lit_adv.models.PixelCNN"
        )
    return log_prob / (-math.log(2) * image.shape[1:].numel())
