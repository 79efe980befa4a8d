"""Defences, one file each; the contract is :class:`lit_adv.defense.Defense`."""

from lit_adv.defenses.adversarial_transformation import AdversarialTransformation
from lit_adv.defenses.guided_complementary import GuidedComplementary
from lit_adv.defenses.pixel_defend import PixelDefend
from lit_adv.defenses.thermometer import LSPGA, Thermometer
from lit_adv.defenses.total_variation import TotalVariation

__all__ = ["LSPGA", "AdversarialTransformation", "GuidedComplementary", "PixelDefend", "Thermometer", "TotalVariation"]
