"""Training losses, one a file: from model and batch to a loss and what to log."""

from lit_adv.objectives.ddn import DDNTraining
from lit_adv.objectives.detection import PairDetection
from lit_adv.objectives.imitation import Imitation
from lit_adv.objectives.likelihood import MaximumLikelihood
from lit_adv.objectives.madry import Madry
from lit_adv.objectives.objective import Objective
from lit_adv.objectives.rectification import Rectification
from lit_adv.objectives.regression import MeanSquaredError
from lit_adv.objectives.standard import Standard
from lit_adv.objectives.trades import TRADES

__all__ = [
    "TRADES",
    "DDNTraining",
    "Imitation",
    "Madry",
    "MaximumLikelihood",
    "MeanSquaredError",
    "Objective",
    "PairDetection",
    "Rectification",
    "Standard",
]
