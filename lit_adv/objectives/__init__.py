"""Training losses, one a file: from model and batch to a loss and what to log."""

from .madry import Madry
from .objective import Objective
from .standard import Standard
from .trades import TRADES

__all__ = ["TRADES", "Madry", "Objective", "Standard"]
