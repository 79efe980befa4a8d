"""Attacks during validation and test, their measures in the log."""

from __future__ import annotations

import math
from collections.abc import Sized
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.seed import isolate_rng

from lit_adv.answers import Output
from lit_adv.attack import Attack
from lit_adv.datamodules import Batch
from lit_adv.metrics import AttackRecords, Summary, summarize
from lit_adv.pictures import image_grid
from lit_adv.protocol import AccessName, Protocol, Target
from lit_adv.report import Outcome
from lit_adv.trial import Trial

_LOGGED = {
    "robust_accuracy": "robust_accuracy",
    "success_rate": "success_rate",
    "median_queries": "median_queries",
    "mean_queries": "mean_queries",
    "mean_l2": "mean_l2",
    "mean_linf": "mean_linf",
}


class AttackEvaluation(Callback):
    """Attacks the task's model on validation images during training (a probe), and on test images.

    Images that the model gets wrong at first are not attacked. The others wait until ``pool`` of them have come
    together over loader batches, are attacked at once, and are verified as they finish. Every process attacks its
    own share of the images; records are joined by image index, so nothing is counted twice and nothing is averaged
    over processes.

    Logs ``stage/robust_accuracy/name``, success rate, mean and median queries of the successes and their mean L2 and
    linf distortion, and a grid of clean image, adversarial image and amplified difference.

    Args:
        name: of the attack in metrics, tables and file names.
        attack: what is tried.
        access: what it is granted; None: just what it needs.
        budget: queries per image; None: no limit.
        target: target classes; none: an untargeted attack.
        max_samples: images looked at, those wrong at first included; None: all.
        pool: images attacked together.
        draws: fresh decisions by which images are judged; None: 1, or 30 for a random model.
        every_n_epochs: during training, attack in every n-th epoch.
        surrogate: a method of the model that gradients go through instead of its own surrogate.
        answers: answers averaged per query of a random model, each charged.
        confirm: fresh answers that must agree before a hit counts; None: 1, or 31 for a random model.
        chunk: images per forward; None: found on the way.
        precision: ``bf16`` searches in bfloat16 and confirms every hit in the model's own precision; values only.
        channels_last: whether the search lays out images with channels innermost; None: where that is faster.
        compile: whether the search runs through ``torch.compile``.
        output: what the model returns.
        dirpath: folder for records and images of a test, from which a broken run resumes; None: the logger's.

    Attributes:
        outcome: what the last validation or test found, for a report.
        summary: its measures.
    """

    def __init__(
        self,
        name: str,
        attack: Attack,
        access: AccessName | None = None,
        budget: int | None = None,
        target: Target = "none",
        max_samples: int | None = None,
        pool: int = 512,
        draws: int | None = None,
        every_n_epochs: int = 1,
        surrogate: str | None = None,
        answers: int = 1,
        confirm: int | None = None,
        chunk: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        channels_last: bool | None = None,
        compile: bool = False,
        output: Output = "logits",
        dirpath: Path | None = None,
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.protocol = Protocol(
            name=name, attack=attack, access=access, budget=budget, target=target, max_samples=max_samples, pool=pool,
            draws=draws, surrogate=surrogate, answers=answers, confirm=confirm, chunk=chunk, precision=precision,
            channels_last=channels_last, compile=compile, output=output,
        )  # fmt: skip
        self.every_n_epochs, self.dirpath = every_n_epochs, dirpath
        self.outcome: Outcome | None = None
        self.summary: Summary | None = None
        self._trial: Trial | None = None
        self._records: AttackRecords | None = None

    @property
    def name(self) -> str:
        """Name of the attack."""
        return self.protocol.name

    @property
    def state_key(self) -> str:
        """Several attacks may stand side by side."""
        return f"AttackEvaluation({self.name})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse two attacks of one name, whose measures would overwrite one another."""
        names = [callback.name for callback in self._all(trainer)]
        if names.count(self.name) > 1:
            raise ValueError(f"two attacks are called {self.name!r}: give each a name of its own")

    @staticmethod
    def _all(trainer: Trainer) -> list[AttackEvaluation]:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, AttackEvaluation)]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a probe, in every n-th epoch."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0 or trainer.state.fn != "fit"
        if due and not trainer.sanity_checking:
            self._begin(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the evaluation."""
        self._begin(trainer, pl_module, "test")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Take the batch's images on."""
        self._add(batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Take the batch's images on."""
        self._add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the probe and log it."""
        self._end(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the evaluation and log it."""
        self._end(trainer, pl_module, "test")

    def _begin(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        self._records = AttackRecords().to(pl_module.device)
        self._trial = Trial(
            self.protocol,
            pl_module.model,  # type: ignore[arg-type]
            data=f"{getattr(data, 'name', '')}/{stage}",
            num_classes=getattr(data, "num_classes", None) or None,
            dirpath=self._folder(trainer) if stage == "test" else None,
            rank=trainer.global_rank,
            world=trainer.world_size,
            total=_images(trainer, stage),
            progress=trainer.is_global_zero and stage == "test",
            place=self._all(trainer).index(self),
            training=getattr(data, "training_images", None),
        )

    def _add(self, batch: Any) -> None:
        if self._trial is not None:
            with isolate_rng():  # an attack in between must not change how training goes on
                self._trial.add(_as_batch(batch))

    def _end(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._trial is None or self._records is None:
            return
        trial, self._trial = self._trial, None
        with isolate_rng():
            self._records.update(trial.close())
        records = self._records.compute()
        self.outcome, self.summary = trial.outcome(records), summarize(records)
        for key, attribute in _LOGGED.items():
            value = getattr(self.summary, attribute)
            if value is not None and math.isfinite(value):
                # every process holds the same joined records: their mean is the value itself
                pl_module.log(
                    f"{stage}/{key}/{self.name}",
                    torch.tensor(value, dtype=torch.float32, device=pl_module.device),
                    prog_bar=key == "robust_accuracy",
                    sync_dist=trainer.world_size > 1,
                    add_dataloader_idx=False,
                )
        self._show(trainer, stage)

    def _show(self, trainer: Trainer, stage: str) -> None:
        examples = self.outcome.examples if self.outcome is not None else None
        if examples is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    f"{stage}/adversarial/{self.name}", image_grid(examples), trainer.current_epoch
                )

    def _folder(self, trainer: Trainer) -> Path | None:
        root = self.dirpath or (trainer.log_dir if trainer.loggers else None)
        if root is None:
            return None
        return Path(str(trainer.strategy.broadcast(str(root)))) / "attacks"


def _as_batch(batch: Any) -> Batch:
    if isinstance(batch, Batch):
        return batch
    raise TypeError(
        f"AttackEvaluation needs batches of (image, label, index), got {type(batch).__name__}: use a data module of "
        "lit_adv.datamodules, or yield lit_adv.datamodules.Batch"
    )


def _images(trainer: Trainer, stage: str) -> int | None:
    loaders = trainer.test_dataloaders if stage == "test" else trainer.val_dataloaders
    sampler = getattr(loaders, "sampler", None)
    return len(sampler) if isinstance(sampler, Sized) else None
