"""Adversarial training on the nearest adversarial images, none farther than a maximal norm."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack
from lit_adv.attacks import DDN
from lit_adv.objectives.madry import Madry
from lit_adv.objectives.objective import LabelledImages, correct, cross_entropy
from lit_adv.threat import ThreatModel


class DDNTraining(Madry):
    """Cross-entropy on each batch's nearest adversarial images, drawn back to an l2 ball around the clean ones.

    An image that is classified wrongly is its own nearest adversarial image and is trained on as it is, so in the
    beginning this is clean training. One that lies farther than ``max_norm`` is drawn back along the straight line,
    and then perhaps classified rightly. An image for which no adversarial one was found gives the attack's last
    candidate, on the sphere it has reached, drawn back as well; the authors' code trains on its clean version.

    Args:
        attack: What makes the images, an l2 attack without a radius; None: DDN of 100 steps on 8-bit images.
        max_norm: Largest l2 norm of a perturbation trained on, in pixel units; 2.4 in the paper for MNIST, 1.0 for
            CIFAR-10.
        from_epoch: Epochs of clean training before; 0 in the paper for MNIST, 200 for CIFAR-10.

    Raises:
        ValueError: If a number lies outside its range, or the attack is not in l2.

    References:
        Rony et al. 2019, https://arxiv.org/abs/1811.09600, section 6.
    """

    def __init__(self, attack: IterativeAttack | None = None, max_norm: float = 2.4, from_epoch: int = 0) -> None:
        attack = DDN(ThreatModel("l2", "inf", levels=255)) if attack is None else attack
        if attack.threat.norm != "l2":
            raise ValueError(f"attack must be in l2, as max_norm is, got {attack.threat.norm!r}: give a DDN")
        if not 0 < max_norm < math.inf:
            raise ValueError(f"max_norm must be a finite length > 0 in pixel units, got {max_norm}")
        if from_epoch < 0:
            raise ValueError(f"from_epoch must be at least 0, got {from_epoch}")
        super().__init__(attack)
        self.max_norm = float(max_norm)
        self.from_epoch = from_epoch
        self.ball = dataclasses.replace(attack.threat, eps=self.max_norm)

    def __call__(self, model: nn.Module, batch: LabelledImages) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch.image, batch.label
        if self.epoch < self.from_epoch:
            logits = model(x)
            return cross_entropy(logits, y), {"accuracy": correct(logits, y)}
        x_adv = self.perturb(model, x, y)
        logits = model(x_adv)
        return cross_entropy(logits, y), {
            "robust_accuracy": correct(logits, y),
            "distance": self.ball.distance(x_adv, x),
        }

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The nearest adversarial images, of norm at most ``max_norm``.

        Shape:
            x (n, C, H, W) in [0, 1], y (n,) -> (n, C, H, W), in the box.
        """
        with torch.no_grad():
            return self.ball.project(super().perturb(model, x, y), x)
