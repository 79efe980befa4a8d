"""Detection: a network learns to tell adversarial images from clean ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_adv.archive import weights_hash
from lit_adv.detector import NetworkDetector
from lit_adv.detectors.sensitivity import log_sensitivity
from lit_adv.kept import KeptByPlace
from lit_adv.metrics.detection import PairedAuc
from lit_adv.objectives.detection import PairDetection, pair_loss, paired_views
from lit_adv.response import answered
from lit_adv.tasks.task import MeanPerImage, Task

_CHUNK = 128  # images whose gradient maps are made together


class Detection(Task):
    """Trains a detector on pairs of a clean and an adversarial image; arguments are those of ``Task``.

    The classifier stays as it is. Before training the detector's scale is calibrated on the training pairs. Logs
    val/auc, val/loss, ``false_alarms`` (clean images judged adversarial) and ``detected``, each pair once, and, where a
    classifier can be asked, histograms of the input sensitivity of clean and adversarial validation images.

    The epoch of least validation loss is kept: on few pairs the area under the ROC curve is 1 in many epochs alike.
    """

    measures = ("loss", "false_alarms", "detected")
    best = ("val/loss", "min")

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        if not isinstance(self.model, NetworkDetector):
            raise ValueError(
                f"model must be a detector with a network, as lit_adv.detectors.ImageDetector, got "
                f"{type(self.model).__name__}"
            )
        self.areas = torch.nn.ModuleDict({f"{stage}_auc": PairedAuc() for stage in ("val", "test")})
        self._kept = {stage: KeptByPlace() for stage in ("val", "test")}

    @property
    def detector(self) -> NetworkDetector:
        """The model."""
        assert isinstance(self.model, NetworkDetector)
        return self.model

    def setup(self, stage: str) -> None:
        """See that the pairs are about the classifier that the detector protects."""
        self._kept = {stage: KeptByPlace() for stage in ("val", "test")}  # other pairs may stand at the same places
        if isinstance(self.objective, PairDetection):
            self.objective.forget()
        data = getattr(self._trainer, "datamodule", None)
        attacked = getattr(data, "model_hash", None)
        if attacked is not None and self.detector.classifier is not None:
            own = weights_hash(self.detector.classifier)
            if own != attacked:
                raise ValueError(
                    f"the pairs are attacks on another network (weights {attacked[:12]}) than the classifier that the "
                    f"detector protects ({own[:12]}): make pairs for this classifier, or name the one attacked"
                )

    def on_fit_start(self) -> None:
        """Calibrate the detector's scale, where it computes by now; one that was read to go on with stays."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and self.trainer.ckpt_path is None:
            pairs = data.dataset("train").pairs
            self.detector.calibrate(self._parts(pairs.image), self._parts(pairs.x_adv))

    def _parts(self, images: Tensor) -> Iterator[Tensor]:
        device = next((parameter.device for parameter in self.detector.parameters()), torch.device("cpu"))
        for part in torch.split(images, _CHUNK):
            yield part.to(device)

    def on_validation_epoch_end(self) -> None:
        """Show once how sensitive the classifier is to the validation images (figures 3 and 4 of the paper)."""
        log: Any = getattr(self.logger, "experiment", None)
        if self.current_epoch or self.trainer.sanity_checking or not self.trainer.is_global_zero:
            return
        if not hasattr(log, "add_histogram"):
            return
        data = getattr(self._trainer, "datamodule", None)
        if data is None or self.detector.classifier is None:
            return
        pairs = data.dataset("val").pairs
        for name, images in (("clean", pairs.image), ("adversarial", pairs.x_adv)):
            if len(images):
                found = [log_sensitivity(self.detector.respond(part.to(self.device))) for part in images.split(_CHUNK)]
                log.add_histogram(f"val/log10_sensitivity/{name}", torch.cat(found).cpu(), self.global_step)

    def _measure(self, stage: str, batch: Any) -> None:
        views = paired_views(self.detector, batch, self._kept[stage])
        scores = answered(self.detector.network, views.flatten(0, 1)).float().reshape(*views.shape[:2], 2)
        margin = scores[..., 1] - scores[..., 0]
        values = {
            "loss": pair_loss(scores),
            "false_alarms": (margin[:, 0] > 0).float(),
            "detected": (margin[:, 1] > 0).float(),
        }
        for name, value in values.items():
            metric = self.measured[f"{stage}_{name}"]
            assert isinstance(metric, MeanPerImage)
            metric.update(value, batch.place)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True)
        area = self.areas[f"{stage}_auc"]
        assert isinstance(area, PairedAuc)
        area.update(margin[:, 0], margin[:, 1], batch.place)
        self.log(f"{stage}/auc", area, on_step=False, on_epoch=True, prog_bar=True)
