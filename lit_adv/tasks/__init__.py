"""Tasks: what is trained, as Lightning modules, and the networks in their checkpoints."""

from lit_adv.tasks.checkpoint import Checkpoint, CheckpointError, export_checkpoint, load_weights, read_checkpoint
from lit_adv.tasks.classification import Classification
from lit_adv.tasks.task import Task

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Classification",
    "Task",
    "export_checkpoint",
    "load_weights",
    "read_checkpoint",
]
