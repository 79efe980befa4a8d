"""Gradient estimators, one file each."""

from lit_adv.estimators.autograd import Autograd
from lit_adv.estimators.nes import NES

__all__ = ["NES", "Autograd"]
