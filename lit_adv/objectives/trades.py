"""TRADES: robustness as agreement with the answer to the clean image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adv.attack import attacking
from lit_adv.objectives.objective import LabelledImages, Objective, correct, cross_entropy
from lit_adv.threat import ThreatModel


class TRADES(Objective):
    """CE(clean) + beta KL(clean || adv), with adv found by ascent on the same divergence in eval mode.

    Args:
        threat: Ball in which the adversarial image lies.
        beta: Weight of the divergence, at least 0.
        steps: Ascent steps, at least 1.
        step_size: Length of one, in pixel units and the threat model's norm.
        sigma: Standard deviation of the normal noise that the ascent starts from, in pixel units.

    Raises:
        ValueError: If a number lies outside its range.

    References:
        Zhang et al. 2019, https://arxiv.org/abs/1901.08573, equation 5 and algorithm 1; the divergence is summed
        over classes and averaged over the batch, and its gradient flows into both answers, as in the authors' code.
    """

    def __init__(
        self,
        threat: ThreatModel,
        beta: float = 6.0,
        steps: int = 10,
        step_size: float = 0.007,
        sigma: float = 0.001,
    ) -> None:
        for name, value, least in (("beta", beta, 0), ("steps", steps, 1), ("sigma", sigma, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if step_size <= 0:
            raise ValueError(f"step_size must be positive, in pixel units, got {step_size}")
        self.threat = threat
        self.beta = beta
        self.steps = steps
        self.step_size = step_size
        self.sigma = sigma

    def __call__(self, model: nn.Module, batch: LabelledImages) -> tuple[Tensor, dict[str, Tensor]]:
        x_adv = self.perturb(model, batch.image)
        logits, logits_adv = model(batch.image), model(x_adv)
        divergence = divergence_per_image(logits_adv, logits).mean()
        loss = cross_entropy(logits, batch.label) + self.beta * divergence
        return loss, {
            "accuracy": correct(logits, batch.label),
            "robust_accuracy": correct(logits_adv, batch.label),
            "divergence": divergence.detach(),
        }

    def perturb(self, model: nn.Module, x: Tensor) -> Tensor:
        """Images near ``x`` on which the answer differs most from the one on ``x``; no gradient flows through them.

        Shape:
            x (n, C, H, W) in [0, 1] -> (n, C, H, W), within the threat model.
        """
        ask = getattr(model, "surrogate", model)
        with attacking(model):
            with torch.no_grad():
                clean = model(x)
            x_adv = x.detach() + self.sigma * torch.randn_like(x)
            for _ in range(self.steps):
                with torch.enable_grad():
                    leaf = x_adv.requires_grad_()
                    (gradient,) = torch.autograd.grad(divergence_per_image(ask(leaf), clean).sum(), leaf)
                with torch.no_grad():
                    x_adv = self.threat.project(x_adv + self.step_size * self.threat.steepest(gradient), x)
        return x_adv.detach()


def divergence_per_image(logits_adv: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(logits_adv)) of each row, in nats, in float32 at least.

    Shape:
        (n, K), (n, K) -> (n,)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = F.log_softmax(logits.to(dtype), dim=-1), F.log_softmax(logits_adv.to(dtype), dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
