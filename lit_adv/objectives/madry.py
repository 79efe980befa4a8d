"""Adversarial training: train on what the attack makes of each batch."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from lit_adv.attack import IterativeAttack, attacking
from lit_adv.objectives.objective import LabelledImages, Objective, correct, cross_entropy
from lit_adv.oracle import QueryOracle


class Madry(Objective):
    """Cross-entropy on adversarial images, found anew for every batch, in part on clean ones if asked.

    The attack runs in eval mode, its images carry no gradient, and the loss is taken in train mode.

    Args:
        attack: What makes the images; all its steps are run.
        clean_share: Weight of the clean loss, in [0, 1); 0.5: half on the clean images, half on the adversarial
            versions of the same images, in one forward.
        ramp_epochs: Epochs over which radius and step size grow linearly from 0 to the attack's; fractions count,
            so that they grow with every step.
        attack_label: Label to move away from; "predicted" is the model's own answer, so that a single gradient
            step does not leak the label into the image.

    Raises:
        ValueError: If a number lies outside its range, or a ramp is asked for a radius without limit.

    References:
        Madry et al. 2018, https://arxiv.org/abs/1706.06083, equation 2.1. Goodfellow et al. 2015,
        https://arxiv.org/abs/1412.6572, section 6 (``clean_share`` 0.5). Kurakin et al. 2017,
        https://arxiv.org/abs/1611.01236, section 4 (label leaking).
    """

    def __init__(
        self,
        attack: IterativeAttack,
        clean_share: float = 0.0,
        ramp_epochs: float = 0.0,
        attack_label: Literal["true", "predicted"] = "true",
    ) -> None:
        if not 0.0 <= clean_share < 1.0:
            raise ValueError(f"clean_share must lie in [0, 1), got {clean_share}; for 1 use Standard")
        if ramp_epochs < 0:
            raise ValueError(f"ramp_epochs must be at least 0, got {ramp_epochs}")
        if ramp_epochs and math.isinf(attack.threat.radius):
            raise ValueError("ramp_epochs must be 0 where eps is inf: there is no radius to grow to")
        if attack_label not in ("true", "predicted"):
            raise ValueError(f"attack_label must be 'true' or 'predicted', got {attack_label!r}")
        self.attack = attack
        self.clean_share = clean_share
        self.ramp_epochs = ramp_epochs
        self.attack_label = attack_label

    def __call__(self, model: nn.Module, batch: LabelledImages) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch.image, batch.label
        x_adv = self.perturb(model, x, y)
        if not self.clean_share:
            logits_adv = model(x_adv)
            return cross_entropy(logits_adv, y), {"robust_accuracy": correct(logits_adv, y)}
        logits, logits_adv = model(torch.cat([x, x_adv])).chunk(2)
        loss = self.clean_share * cross_entropy(logits, y) + (1 - self.clean_share) * cross_entropy(logits_adv, y)
        return loss, {"accuracy": correct(logits, y), "robust_accuracy": correct(logits_adv, y)}

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The adversarial images of the current epoch.

        Shape:
            x (n, C, H, W) in [0, 1], y (n,) -> (n, C, H, W), within the threat model.
        """
        share = min(1.0, self.epoch / self.ramp_epochs) if self.ramp_epochs else 1.0
        if share == 0.0:
            return x
        if self.attack_label == "predicted":
            with attacking(model), torch.no_grad():
                y = model(x).argmax(dim=-1)
        oracle = QueryOracle(model, len(x), chunk=len(x))
        return scaled(self.attack, share).perturb(oracle, x, y).detach()


def scaled(attack: IterativeAttack, share: float) -> IterativeAttack:
    """The attack with radius and step size times ``share``.

    Args:
        attack: Left as it is.
        share: Factor in [0, 1].
    """
    if share == 1.0:
        return attack
    smaller = attack.with_threat(dataclasses.replace(attack.threat, eps=attack.threat.radius * share))
    if getattr(smaller, "step_size", None) is not None:  # None follows the radius by itself
        smaller.step_size *= share  # type: ignore[attr-defined]
    return smaller
