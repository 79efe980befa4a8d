"""Gradient estimators, one file each."""

from lit_adv.estimators.autograd import Autograd
from lit_adv.estimators.bandits import Bandits
from lit_adv.estimators.finite_difference import Coordinates, FiniteDifference, PrincipalComponents, RandomGroups
from lit_adv.estimators.nes import NES
from lit_adv.estimators.spsa import SPSA

__all__ = [
    "NES",
    "SPSA",
    "Autograd",
    "Bandits",
    "Coordinates",
    "FiniteDifference",
    "PrincipalComponents",
    "RandomGroups",
]
