"""Training on clean images."""

from torch import Tensor, nn

from lit_adv.objectives.objective import LabelledImages, Objective, correct, cross_entropy


class Standard(Objective):
    """Cross-entropy on clean images.

    Args:
        label_smoothing: Share of the probability spread evenly over all classes, in [0, 1].

    Raises:
        ValueError: If ``label_smoothing`` lies outside [0, 1].
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: LabelledImages) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch.image)
        loss = cross_entropy(logits, batch.label, self.label_smoothing)
        return loss, {"accuracy": correct(logits, batch.label)}
