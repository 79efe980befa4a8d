"""Tasks: what is trained, as Lightning modules, and the networks in their checkpoints."""

from lit_adv.tasks.checkpoint import Checkpoint, CheckpointError, export_checkpoint, load_weights, read_checkpoint
from lit_adv.tasks.classification import Classification
from lit_adv.tasks.density import Density
from lit_adv.tasks.detection import Detection
from lit_adv.tasks.plain_weights import PlainWeights
from lit_adv.tasks.rectification import Rectification
from lit_adv.tasks.regression import Regression
from lit_adv.tasks.task import Task

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Classification",
    "Density",
    "Detection",
    "PlainWeights",
    "Rectification",
    "Regression",
    "Task",
    "export_checkpoint",
    "load_weights",
    "read_checkpoint",
]
