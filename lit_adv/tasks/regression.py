"""Regression: networks that answer numbers of an image's size or another, rather than classes."""

from typing import Any

import torch

from lit_adv.objectives.regression import MeanSquaredError, squared_error
from lit_adv.tasks.task import MeanPerImage, Task


class Regression(Task):
    """Trains a network by mean squared error; the epoch of least validation error is kept.

    Logs val/mse and test/mse, per element and each image once; ``mse_of_zero``, the error of answering 0; and, where
    image and target have one shape, ``mse_of_input``, that of answering the image itself. A network that has learnt
    something lies below both. Arguments are those of ``Task``: the objective, a ``MeanSquaredError``, says what is to
    be answered (none: the batch's own target); a plateau schedule takes ``lr_monitor: val/mse``.
    """

    measures = ("mse", "mse_of_zero", "mse_of_input")
    best = ("val/mse", "min")

    def _measure(self, stage: str, batch: Any) -> None:
        objective = MeanSquaredError() if self.objective is None else self.objective
        if not isinstance(objective, MeanSquaredError):
            raise ValueError(
                f"objective must be a MeanSquaredError, got {type(objective).__name__}: only that says what is to be "
                "answered"
            )
        target = objective.target(batch)
        values = {
            "mse": squared_error(self.model(batch.image), target),
            "mse_of_zero": squared_error(torch.zeros_like(target), target),
        }
        if batch.image.shape == target.shape:
            values["mse_of_input"] = squared_error(batch.image, target)
        for name, value in values.items():
            metric = self.measured[f"{stage}_{name}"]
            assert isinstance(metric, MeanPerImage)
            metric.update(value, batch.index)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "mse")
