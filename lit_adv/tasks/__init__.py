"""Tasks: what is trained, as Lightning modules, and the networks in their checkpoints."""

from .checkpoint import Checkpoint, CheckpointError, export_checkpoint, load_weights, read_checkpoint
from .classification import Classification
from .task import Task

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Classification",
    "Task",
    "export_checkpoint",
    "load_weights",
    "read_checkpoint",
]
