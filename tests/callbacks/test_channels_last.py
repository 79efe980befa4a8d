"""Weights laid out for training."""

from __future__ import annotations

import torch
from pytorch_lightning import Trainer

from lit_adv.callbacks import ChannelsLast
from lit_adv.models import DigitsNet
from lit_adv.tasks import Classification


def test_weights_are_laid_out_with_channels_innermost_and_keep_their_values() -> None:
    task = Classification(DigitsNet())
    before = {name: value.clone() for name, value in task.state_dict().items()}
    ChannelsLast().on_fit_start(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), task)
    assert task.model.features[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
