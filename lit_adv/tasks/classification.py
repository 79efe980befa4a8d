"""Classification, defended or not."""

from typing import Any

import torch
import torch.nn.functional as F

from lit_adv.answers import check_answer
from lit_adv.datamodules import Batch
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.tasks.task import MeanPerImage, Task

CLEAN = -11  # key of the draws behind clean metrics, apart from those of attacks, queries and training


class Classification(Task):
    """Trains a classifier; its clean metrics are the cross-entropy and the share of images classified rightly.

    A refused image (a detector's further column) counts as classified wrongly. A random defence answers each image
    once, by draws of that image's place in the data set: the same in every epoch, for any batch size and any number
    of processes. Arguments are those of ``Task``.
    """

    _sound = False  # whether the network's answers have been looked at

    def _check(self, logits: Any, images: int) -> None:
        """Refuse, at the first batch, what is no classifier of this data."""
        check_answer(logits, images, "logits", self.model)
        known = getattr(getattr(self._trainer, "datamodule", None), "num_classes", None)
        classes = logits.shape[1] - (getattr(self.model, "reject", None) is not None)
        if known and classes != known:
            raise ValueError(
                f"{type(self.model).__name__} answers {classes} classes and the data set has {known}: choose the data "
                "the model was trained on, or set num_classes"
            )
        self._sound = True

    def _answer(self, batch: Batch) -> Any:
        if isinstance(self.model, Defense) and self.model.stochastic:
            return self.model(batch.image, draws=Draws(0, batch.index, torch.zeros_like(batch.index), CLEAN))
        return self.model(batch.image)

    def _measure(self, stage: str, batch: Batch) -> None:
        logits = self._answer(batch)
        if not self._sound:
            self._check(logits, len(batch.label))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values = {
            "loss": F.cross_entropy(wide, batch.label, reduction="none"),
            "accuracy": (logits.argmax(-1) == batch.label).float(),
        }
        for name, value in values.items():
            metric = self.measured[f"{stage}_{name}"]
            assert isinstance(metric, MeanPerImage)
            metric.update(value, batch.index)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "accuracy")
