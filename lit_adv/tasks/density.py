"""Density: networks that answer how probable an image is."""

from typing import Any

from lit_adv.objectives.likelihood import bits_per_dim
from lit_adv.tasks.task import MeanPerImage, Task


class Density(Task):
    """Trains a density of images by maximum likelihood; the epoch of fewest validation bits is kept.

    Logs val/bits_per_dim and test/bits_per_dim, each image once: the bits that a value of an image takes to store, 8
    for uniformly random ones. Arguments are those of ``Task``; a plateau schedule takes
    ``lr_monitor: val/bits_per_dim``.
    """

    measures = ("bits_per_dim",)
    best = ("val/bits_per_dim", "min")

    def _measure(self, stage: str, batch: Any) -> None:
        metric = self.measured[f"{stage}_bits_per_dim"]
        assert isinstance(metric, MeanPerImage)
        metric.update(bits_per_dim(self.model(batch.image), batch.image), batch.index)
        self.log(f"{stage}/bits_per_dim", metric, on_step=False, on_epoch=True, prog_bar=True)
