"""Train defended image classifiers, attack them, and report honestly what holds.

``lit_adv.evaluate(model, loader, attacks)`` is the front door for a notebook; attacks, defences, models, data modules
and metrics stand in the packages of those names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_adv.evaluation import evaluate

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate"]


def __getattr__(name: str) -> Any:
    """``evaluate`` brings Lightning along, so it is imported when first asked for."""
    if name == "evaluate":
        from lit_adv.evaluation import evaluate

        return evaluate
    raise AttributeError(f"module 'lit_adv' has no attribute {name!r}")
