"""Classification, defended or not."""

import torch
import torch.nn.functional as F

from lit_adv.datamodules import Batch
from lit_adv.tasks.task import MeanPerImage, Task


class Classification(Task):
    """Trains a classifier; its clean metrics are the cross-entropy and the share of images classified rightly.

    A refused image (a detector's further column) counts as classified wrongly. Arguments are those of ``Task``.
    """

    def _measure(self, stage: str, batch: Batch) -> None:
        logits = self.model(batch.image)
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
