"""The audit's probes at the end of a test, on images of the test set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng

from lit_adv.audit import Audited
from lit_adv.callbacks.attack_evaluation import AttackEvaluation
from lit_adv.datamodules import Batch
from lit_adv.probes import IMAGES, Probing, outputs, seen_by


class Audit(Callback):
    """Probes the task's model once the attacks of a test have ended: can their figures be believed?

    The first process probes, on the first of its images that the model gets right; the others wait.

    Args:
        images: looked at, right at first; a quarter of a random model's.
        dirpath: folder for the records of the small attacks, from which a broken run resumes; None: nothing is written.

    Attributes:
        probed: the findings, for the report; empty on other processes.

    Raises:
        ValueError: no image is to be looked at.
    """

    def __init__(self, images: int = IMAGES, dirpath: Path | None = None) -> None:
        if images < 1:
            raise ValueError(f"audit_images must be at least 1, got {images}: leave the audit out with --audit=false")
        self.images, self.dirpath = images, dirpath
        self.probed: list[Audited] = []
        self._probing: Probing | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to gather images, on the first process."""
        self.probed, self._probing = [], None
        protocols = [attack.protocol for attack in _attacks(trainer)]
        if not trainer.is_global_zero or not protocols:
            return
        data = f"{getattr(getattr(trainer, 'datamodule', None), 'name', '')}/test"
        self._probing = Probing(
            pl_module.model,  # type: ignore[arg-type]
            self.images,
            share(seen_by(protocols), trainer.world_size),
            outputs(protocols),
            data,
            None if self.dirpath is None else self.dirpath / "audit",
            progress=True,
        )

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Take on what the model gets right, as long as images are missing."""
        if self._probing is not None and not self._probing.full and isinstance(batch, Batch):
            with isolate_rng():
                self._probing.add(batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe."""
        if self._probing is None:
            return
        probing, self._probing = self._probing, None
        outcomes = [attack.outcome for attack in _attacks(trainer) if attack.outcome is not None]
        with isolate_rng():
            self.probed = probing.audited(outcomes, [each.protocol.attack.threat for each in _attacks(trainer)])


def share(images: int | None, world: int) -> int | None:
    """The first process's part of the images that the attacks look at."""
    return None if images is None else -(-images // world)


def _attacks(trainer: Trainer) -> list[AttackEvaluation]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, AttackEvaluation)]
