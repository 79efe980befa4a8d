"""Lightning callbacks."""

from lit_adv.callbacks.attack_evaluation import AttackEvaluation
from lit_adv.callbacks.audit import Audit
from lit_adv.callbacks.channels_last import ChannelsLast

__all__ = ["AttackEvaluation", "Audit", "ChannelsLast"]
