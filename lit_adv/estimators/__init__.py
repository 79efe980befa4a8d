"""Gradient estimators, one file each."""

from lit_adv.estimators.autograd import Autograd

__all__ = ["Autograd"]
