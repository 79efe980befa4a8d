"""Lightning callbacks."""

from lit_adv.callbacks.attack_evaluation import AttackEvaluation
from lit_adv.callbacks.audit import Audit

__all__ = ["AttackEvaluation", "Audit"]
