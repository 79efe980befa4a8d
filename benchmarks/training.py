"""Adversarial training by the trainer against a hand-written loop of the same steps."""

import copy
import logging
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import Clock, Comparison, in_turn
from pytorch_lightning import Trainer
from torch import Tensor, nn

from lit_adv.attacks import PGD
from lit_adv.datamodules import Digits, ImageDataModule
from lit_adv.datamodules.sources import PixelImages, Source
from lit_adv.models import DigitsNet, ModelA
from lit_adv.objectives import Madry
from lit_adv.tasks import Classification
from lit_adv.threat import ThreatModel

EPS, STEP_SIZE, STEPS, BATCH = 0.3, 0.1, 7, 64


class Noise(ImageDataModule):
    """Random images of the size of MNIST's with random labels."""

    name = "noise"
    num_classes = 10
    dims = (1, 28, 28)

    def source(self, train: bool) -> Source:
        """So many images that they fill ten batches."""
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (10 * BATCH, *self.dims), generator=draw, dtype=torch.uint8)
        return PixelImages(pixels, torch.randint(10, (10 * BATCH,), generator=draw))


@dataclass(frozen=True)
class Case:
    """A network, its training images, and for how long it is trained."""

    name: str
    model: nn.Module
    data: ImageDataModule
    epochs: int
    goal: float = 1.10


def cases(quick: bool) -> list[Case]:
    """The measurements; quick ones do less of the same."""
    narrow = ModelA(filters=(16, 32), hidden=100, dropout=(0.0, 0.0))
    return [
        Case("Madry training, digits net", DigitsNet(), Digits(batch_size=BATCH, val_split=0), 2 if quick else 5),
        Case("Madry training, narrow Model A", narrow, Noise(batch_size=BATCH, val_split=0), 1 if quick else 2),
    ]


def compare(case: Case, device: torch.device, repetitions: int, clock: Clock) -> Comparison:
    """Time the trainer against the loop."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    case.data.setup("fit")
    batches = list(case.data.train_dataloader())
    x = torch.cat([batch.image for batch in batches]).to(device)
    y = torch.cat([batch.label for batch in batches]).to(device)
    base, ours = in_turn(lambda: _loop(case, x, y), lambda: _fit(case, device), repetitions, clock)
    work = f"{case.epochs * len(batches)} steps of {BATCH} images, PGD-{STEPS}"
    return Comparison(case.name, case.goal, work, base, ours)


def _fit(case: Case, device: torch.device) -> None:
    attack = PGD(ThreatModel("linf", EPS), steps=STEPS, step_size=STEP_SIZE)
    task = Classification(copy.deepcopy(case.model), Madry(attack))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about loaders and loggers
        trainer = Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1,
            max_epochs=case.epochs,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, datamodule=case.data)


def _loop(case: Case, x: Tensor, y: Tensor) -> None:
    model = copy.deepcopy(case.model).to(x.device)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(case.epochs):
        for chosen in torch.split(torch.randperm(len(x), device=x.device), BATCH):
            image, label = x[chosen], y[chosen]
            x_adv = _perturb(model.eval(), image, label)
            loss = F.cross_entropy(model.train()(x_adv), label)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()


def _perturb(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    low, high = (image - EPS).clamp_(min=0), (image + EPS).clamp_(max=1)
    x = torch.empty_like(image).uniform_(-EPS, EPS).add_(image).clamp_(0, 1)
    for _ in range(STEPS):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), label, reduction="sum"), x)
        x = (x.detach() + STEP_SIZE * gradient.sign()).clamp_(low, high)
    return x
