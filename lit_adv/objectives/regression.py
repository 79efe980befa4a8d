"""Training a network that answers numbers rather than classes."""

import torch
from torch import Tensor, nn

from lit_adv.objectives.objective import LabelledImages, Objective


class MeanSquaredError(Objective):
    """Mean squared error per element against what the network shall answer, by default the batch's own ``target``.

    A subclass says in :meth:`target` what else is to be answered, and a task measures by the same.
    """

    def target(self, batch: LabelledImages) -> Tensor:
        """What the network shall answer of a batch, in the shape of its answer.

        Raises:
            ValueError: If the batch has no targets.
        """
        target = getattr(batch, "target", None)
        if not isinstance(target, Tensor):
            raise ValueError(
                f"a batch must hold a tensor 'target' to regress on, {type(batch).__name__} does not: choose data with "
                "targets, e.g. lit_adv.datamodules.PerturbationPairs, or an objective that makes them"
            )
        return target.detach()

    def __call__(self, model: nn.Module, batch: LabelledImages) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            target = self.target(batch)
        error = squared_error(model(batch.image), target)
        return error.mean(), {"mse_of_zero": squared_error(torch.zeros_like(target), target)}


def squared_error(answer: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image's elements, in float32 at least.

    Shape:
        answer (n, ...), target of the same shape -> (n,)

    Raises:
        ValueError: If the shapes differ, which would be broadcast unseen.
    """
    if answer.shape != target.shape:
        raise ValueError(
            f"the network answers shape {tuple(answer.shape)} and shall answer {tuple(target.shape)}: choose its "
            "channels and size accordingly"
        )
    wide = torch.promote_types(torch.promote_types(answer.dtype, target.dtype), torch.float32)
    return (answer.to(wide) - target.to(wide)).square().flatten(1).mean(1)
