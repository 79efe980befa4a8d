"""Detectors of adversarial images, one file each; the contract is :class:`lit_adv.detector.Detector`."""

from lit_adv.detectors.image import ImageDetector
from lit_adv.detectors.local_intrinsic_dimension import LocalIntrinsicDimension
from lit_adv.detectors.mahalanobis import Mahalanobis
from lit_adv.detectors.pixel_defend import Likelihood
from lit_adv.detectors.saliency import SaliencyDetector
from lit_adv.detectors.sensitivity import InputSensitivity, SensitivityDetector
from lit_adv.detectors.turning_weakness import TurningWeakness

__all__ = [
    "ImageDetector",
    "InputSensitivity",
    "Likelihood",
    "LocalIntrinsicDimension",
    "Mahalanobis",
    "SaliencyDetector",
    "SensitivityDetector",
    "TurningWeakness",
]
