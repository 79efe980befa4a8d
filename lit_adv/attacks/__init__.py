"""Attacks, one file each."""

from lit_adv.attacks.apgd import APGD
from lit_adv.attacks.baselines import DifferenceOfMeans, RandomNoise
from lit_adv.attacks.boundary import Boundary
from lit_adv.attacks.carlini_wagner import CarliniWagner
from lit_adv.attacks.cascade import Cascade
from lit_adv.attacks.ddn import DDN
from lit_adv.attacks.deepfool import DeepFool
from lit_adv.attacks.fab import FAB
from lit_adv.attacks.gen_attack import GenAttack
from lit_adv.attacks.hop_skip_jump import HopSkipJump
from lit_adv.attacks.nattack import NAttack
from lit_adv.attacks.pgd import PGD
from lit_adv.attacks.pso import PSO
from lit_adv.attacks.simba import SimBA
from lit_adv.attacks.square import Square
from lit_adv.attacks.transfer import Transfer
from lit_adv.attacks.zoo import ZOO

__all__ = [
    "APGD",
    "DDN",
    "FAB",
    "PGD",
    "PSO",
    "ZOO",
    "Boundary",
    "CarliniWagner",
    "Cascade",
    "DeepFool",
    "DifferenceOfMeans",
    "GenAttack",
    "HopSkipJump",
    "NAttack",
    "RandomNoise",
    "SimBA",
    "Square",
    "Transfer",
]
