"""Defences, one file each; the contract is :class:`lit_adv.defense.Defense`."""

from lit_adv.defenses.adversarial_transformation import AdversarialTransformation
from lit_adv.defenses.thermometer import LSPGA, Thermometer

__all__ = ["LSPGA", "AdversarialTransformation", "Thermometer"]
