"""Attacks, one file each."""

from lit_adv.attacks.nattack import NAttack
from lit_adv.attacks.pgd import PGD

__all__ = ["PGD", "NAttack"]
