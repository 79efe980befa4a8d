"""Training a network to imitate what a random defence makes of an image."""

import torch
from torch import Tensor, nn

from lit_adv.answers import evaluating
from lit_adv.objectives.objective import LabelledImages
from lit_adv.objectives.regression import MeanSquaredError


class Imitation(MeanSquaredError):
    """Mean squared error against g(x), the transformation inside a defence, drawn anew at every call.

    No network can err less than the variance of g. The best one answers E g(x), through which an attacker can then
    differentiate (reparameterisation).

    Args:
        defense: has a method ``transform`` from images to images of the same shape; frozen, in eval mode, and no part
            of what is trained or saved.

    Raises:
        ValueError: If the defence has no such method.

    References:
        Xiao & Zheng 2020, "One Man's Trash is Another Man's Treasure", CVPR, section 4.1; Athalye et al. 2018,
        https://arxiv.org/abs/1802.00420, section 4.3 (reparameterisation). The released code adds x to the target a
        second time, which its sigmoid cannot answer; not so here.
    """

    def __init__(self, defense: nn.Module) -> None:
        if not callable(getattr(defense, "transform", None)):
            raise ValueError(
                f"defense must have a method transform from images to images, {type(defense).__name__} has none: give "
                "an AdversarialTransformation, e.g. from a checkpoint"
            )
        self.defense = defense.eval().requires_grad_(False)

    def target(self, batch: LabelledImages) -> Tensor:
        self.defense.to(batch.image.device)
        with evaluating(self.defense), torch.no_grad():
            made: Tensor = self.defense.transform(batch.image)  # type: ignore[operator]
        return made
