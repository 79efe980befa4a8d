"""Rectification: what the network behind a detector makes of adversarial images whose suspects are suppressed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_adv.archive import weights_hash
from lit_adv.draws import Draws
from lit_adv.objectives import Rectification as RectificationObjective
from lit_adv.objectives.objective import correct
from lit_adv.objectives.rectification import Masks, attacked, rectifying
from lit_adv.suppression import suppressed
from lit_adv.tasks.classification import CLEAN
from lit_adv.tasks.task import MeanPerImage, Task


class Rectification(Task):
    """Trains a defence's rectifier, and nothing else of it, on attacked images; the epoch of best accuracy is kept.

    Logs, of validation and test pairs, each once: ``accuracy``, of the rectifier on patched adversarial images, found
    by a detector or not (the oracle's), and ``loss``, its cross-entropy there; ``accuracy_before``, of the unmodified
    classifier on the same patched images; ``clean_accuracy``, of the rectifier on patched clean images. Each image is
    patched once, by draws of its place among the pairs: the same in every epoch. Arguments are those of ``Task``.

    Raises:
        ValueError: If the model is no defence with a rectifier of its own weights, or the pairs are attacks on another
            classifier.
    """

    measures = ("loss", "accuracy", "accuracy_before", "clean_accuracy")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        defense = rectifying(self.model)
        own = {id(weight) for weight in defense.rectifier.parameters()}
        if any(id(weight) in own for weight in defense.classifier.parameters()):
            raise ValueError(
                "the rectifier shares weights with the classifier, which would be trained with it: give a copy of the "
                "classifier as the rectifier"
            )
        self.model.requires_grad_(False)
        defense.rectifier.requires_grad_(True)
        self.masks = Masks()

    def setup(self, stage: str) -> None:
        """See that the pairs are attacks on the classifier that is protected; put the rectifier in train mode.

        What was suspected before is forgotten: the detectors may be others by now.
        """
        self.masks = Masks()
        if isinstance(self.objective, RectificationObjective):
            self.objective.masks = Masks()
        attacked_model = getattr(getattr(self._trainer, "datamodule", None), "model_hash", None)
        own = weights_hash(rectifying(self.model).classifier)
        if attacked_model not in (None, own):
            raise ValueError(
                f"the pairs are attacks on another network (weights {attacked_model[:12]}) than the classifier that is "
                f"protected ({own[:12]}): make pairs for this classifier, or name the one attacked"
            )
        if stage == "fit":  # a copy of a frozen classifier comes in eval mode
            self.model.train()

    def _measure(self, stage: str, batch: Any) -> None:
        batch = attacked(batch)
        defense = rectifying(self.model)
        draws = Draws(0, batch.place, torch.zeros_like(batch.place), CLEAN)
        x = suppressed(batch.x_adv, self.masks(self.model, batch.x_adv), defense.share, draws)
        logits: Tensor = defense.rectifier(x)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        clean = suppressed(batch.image, self.masks(self.model, batch.image), defense.share, draws.later(1))
        values = {
            "loss": F.cross_entropy(wide, batch.label, reduction="none"),
            "accuracy": correct(logits, batch.label),
            "accuracy_before": correct(defense.classifier(x), batch.label),
            "clean_accuracy": correct(defense.rectifier(clean), batch.label),
        }
        for name, value in values.items():
            metric = self.measured[f"{stage}_{name}"]
            assert isinstance(metric, MeanPerImage)
            metric.update(value, batch.place)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "accuracy")
