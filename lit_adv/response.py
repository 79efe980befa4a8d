"""What a classifier says of images: its logits and, on demand, how sensitive they are to the images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_adv.answers import dtype_of
from lit_adv.inputs import precise, wide
from lit_adv.losses import cross_entropy

Classifier = Callable[[Tensor], Tensor]


class Response:
    """The logits and gradients of a frozen classifier at some images, each computed once, when first asked for.

    With a graph if the images require one: then gradients can be differentiated again (double backward). The loss is
    summed over the images, so that no image's gradient depends on the batch. Works under ``no_grad`` and in inference
    mode; autocast is switched off, for gradients of a sure classifier vanish in half precision.

    Args:
        classifier: (n, C, H, W) in [0, 1] to logits (n, K), in eval mode.
        x: images.

    Raises:
        ValueError: when asked, a classifier of fewer than two classes.
    """

    def __init__(self, classifier: Classifier, x: Tensor) -> None:
        self.classifier = classifier
        self.graph = x.requires_grad and torch.is_grad_enabled()
        x = x if self.graph else x.detach()
        with torch.inference_mode(False):  # outside of it a copy is a tensor that gradients can be taken of
            self.x = wide(x.clone() if x.is_inference() else x)
        self._logits: Tensor | None = None
        self._gradient: Tensor | None = None
        self._saliency: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """(n, K) in float32 at least."""
        if self._logits is None:
            with precise(self.x), torch.set_grad_enabled(self.graph):
                self._logits = self._ask(self.x)
        return self._logits

    @property
    def label(self) -> Tensor:
        """The predicted class, (n,) int64: the first of the largest logits, a constant for differentiation."""
        return self.logits.detach().argmax(-1)

    @property
    def gradient(self) -> Tensor:
        """The gradient map G: that of the cross-entropy at the predicted label, of the images' shape.

        Taken of ``softplus(logsumexp of the others - own)``, equal in value to the usual form, whose gradient does not
        cancel where the classifier is sure of itself.

        References: Li et al. 2020, "Are L2 adversarial examples intrinsically different?", equations (1) and (8).
        """
        if self._gradient is None:
            self._gradient = self._slope(cross_entropy)
        return self._gradient

    @property
    def sensitivity(self) -> Tensor:
        """The input sensitivity S, the l2 norm of each image's gradient map, (n,).

        References: Li et al. 2020, equation (1).
        """
        return self.gradient.flatten(1).double().norm(dim=1).to(self.x.dtype)  # squares vanish in float32

    @property
    def saliency(self) -> Tensor:
        """The size of the gradient of the predicted class's logit, largest over the channels, (n, 1, H, W).

        References: Simonyan et al. 2014, https://arxiv.org/abs/1312.6034, section 3.
        """
        if self._saliency is None:
            slope = self._slope(lambda logits, label: logits.gather(1, label[:, None]).squeeze(1))
            self._saliency = slope.abs().amax(1, keepdim=True)
        return self._saliency

    def _slope(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Gradient of a value of each image's logits and predicted class."""
        with precise(self.x):
            leaf = self.x if self.graph else self.x.detach().requires_grad_()
            logits = self._logits if self._logits is not None and self._logits.requires_grad else self._ask(leaf)
            total = value(logits, logits.detach().argmax(-1)).sum()
            (slope,) = torch.autograd.grad(total, leaf, create_graph=self.graph, retain_graph=self.graph)
        self._logits = logits if self.graph else logits.detach()
        return slope

    def _ask(self, x: Tensor) -> Tensor:
        logits = answered(self.classifier, x)
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"the classifier must return logits (n, K >= 2), got shape {tuple(logits.shape)}")
        return logits


def answered(network: Classifier, x: Tensor) -> Tensor:
    """What a network says, in the type of x; it is given x in half precision if its weights are."""
    dtype = dtype_of(network) if isinstance(network, nn.Module) else None
    return network(x.to(dtype) if dtype in (torch.float16, torch.bfloat16) else x).to(x.dtype)
