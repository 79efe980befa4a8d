"""What all tasks share: one model, one objective, an optimiser and a schedule, clean metrics."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_adv.datamodules import Batch
from lit_adv.objectives import Objective
from lit_adv.tasks.checkpoint import FORMAT, KEY, describe
from lit_adv.tasks.recipe import is_recipe

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]


class MeanPerImage(Metric):
    """Mean of one value per image, each image once: a distributed sampler repeats some to even the shares."""

    full_state_update = False
    index: list[Tensor]
    value: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("value", default=[], dist_reduce_fx="cat")

    def update(self, value: Tensor, index: Tensor) -> None:
        """Note one value per image.

        Shape:
            value (n,), index (n,): places in the data set.
        """
        self.index.append(index)
        self.value.append(value.detach().float())

    def compute(self) -> Tensor:
        """The mean over the images seen on all processes."""
        index, order = dim_zero_cat(self.index).sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return dim_zero_cat(self.value)[order][first].double().mean().float()


class Task(LightningModule, ABC):
    """Trains one network or defence, its attribute ``model``, by an objective.

    Logs train/loss and what the objective reports (train/accuracy where it looks at clean images), val/loss,
    val/accuracy, test/loss and test/accuracy. A checkpoint holds the recipe of the model beside its weights.

    Args:
        model: Network or defence, from images in [0, 1] to logits.
        objective: The training loss; needed to train, not to evaluate.
        optimizer: From parameters to an optimiser.
        lr_scheduler: From the optimiser to a learning rate schedule; ``None``: constant.
        lr_interval: Whether the schedule advances once an epoch or once a step.
        lr_monitor: Metric that ``ReduceLROnPlateau`` looks at.

    Attributes:
        recipe: How to build the model, as plain data; ``None`` where it was given as a finished module without one.
        measures: Names of what is measured on validation and test images.
        best: The metric by which the best epoch is chosen, and whether its "max" or "min" is.
    """

    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("val/accuracy", "max")

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr_monitor: str = "val/loss",
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.lr_monitor = lr_monitor
        known = getattr(model, "recipe", None)
        self.recipe: Any = describe(known) if is_recipe(known) else None
        self.measured = nn.ModuleDict(
            {f"{stage}_{name}": MeanPerImage() for stage in ("val", "test") for name in self.measures}
        )

    def remember(self, config: Mapping[str, Any]) -> None:
        """Note the configuration this task was built from, so that a checkpoint alone can be loaded again.

        Args:
            config: Plain data with ``class_path`` and ``init_args``, as LightningCLI parses it.
        """
        plain = describe(config)
        self.recipe = plain["init_args"].get("model")
        # The two further keys are what load_from_checkpoint looks for after LightningCLI.
        further = {
            "_class_path": plain["class_path"],
            "_instantiator": "pytorch_lightning.cli.instantiate_module",
        }
        self.save_hyperparameters({**plain["init_args"], **further}, logger=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K) of images (n, C, H, W) in [0, 1]."""
        return self.model(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the objective on one batch."""
        if self.objective is None:
            raise ValueError("objective is None: training needs one, e.g. lit_adv.objectives.Standard")
        self.objective.epoch = self.current_epoch + batch_idx / max(1, self.trainer.num_training_batches)
        loss, logs = self.objective(self.model, batch)
        for name, value in {"loss": loss.detach(), **logs}.items():
            # Lightning sums value and batch size over batches and processes: the mean over all images.
            self.log(
                f"train/{name}",
                value.float().mean(),
                on_step=False,
                on_epoch=True,
                prog_bar=name == "loss",
                batch_size=len(batch.label),
                sync_dist=True,
            )
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on clean validation images."""
        self._measure("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on clean test images."""
        self._measure("test", batch)

    @abstractmethod
    def _measure(self, stage: str, batch: Batch) -> None:
        """Log what the task counts on clean images of a stage, "val" or "test"."""

    def configure_optimizers(self) -> Any:
        """The optimiser over the trainable parameters of the model, with its schedule."""
        optimizer = self.optimizer(p for p in self.model.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        schedule: dict[str, Any] = {"scheduler": self.lr_scheduler(optimizer), "interval": self.lr_interval}
        if isinstance(schedule["scheduler"], ReduceLROnPlateau):
            schedule["monitor"] = self.lr_monitor
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store, as plain data, how to build the model and what it was trained on."""
        data = getattr(self._trainer, "datamodule", None)
        classes = getattr(data, "num_classes", None) or getattr(self.model, "num_classes", None)
        checkpoint[KEY] = {
            "format": FORMAT,
            "task": f"{type(self).__module__}.{type(self).__qualname__}",
            "model": self.recipe,
            "data": getattr(data, "name", None),
            "num_classes": classes,
        }
