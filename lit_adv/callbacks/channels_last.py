"""A memory layout for training."""

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class ChannelsLast(Callback):
    """Lays out weights with channels innermost while training: on CPUs bfloat16 is then up to twice as fast."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out the weights; the activations follow."""
        pl_module.to(memory_format=torch.channels_last)
