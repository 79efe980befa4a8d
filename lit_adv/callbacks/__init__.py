"""Lightning callbacks."""

from lit_adv.callbacks.attack_evaluation import AttackEvaluation

__all__ = ["AttackEvaluation"]
