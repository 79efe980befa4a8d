"""How an attack is tried: what it is granted, on which images, and how its successes are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lit_adv.answers import Output
from lit_adv.attack import Attack
from lit_adv.oracle import Access

AccessName = Literal["label", "probs", "logits", "gradient"]
Target = Literal["none", "next", "random", "least_likely"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How an attack is tried: what it is granted, on which images, and how its successes are judged.

    Args:
        name: in metrics, tables and file names.
        attack: what is tried.
        access: what it is granted; None: just what it needs. Less is an error at once.
        budget: queries per image; None: no limit.
        target: target classes: none (untargeted), the next class, one drawn by (seed, index), or the clean image's
            least likely.
        max_samples: images looked at, those wrong at first included; None: all.
        pool: images attacked together.
        draws: fresh decisions by which images count as right at first and as broken; None: 1, or 30 if random.
        surrogate: a method of the model that gradients go through instead of its own surrogate.
        answers: answers averaged per query of a random model, each charged.
        confirm: fresh answers that must agree before a hit counts; None: 1, or 31 if random.
        chunk: images per forward; None: found on the way.
        precision: ``bf16`` searches in bfloat16 and confirms every hit in the model's own precision. This, the layout
            and compilation are for attacks that read values of a deterministic model; others go without, and say so.
        channels_last: whether the search lays out images with channels innermost; None: where that is faster.
        compile: whether the search runs through ``torch.compile``.
        output: what the model returns.

    Raises:
        ValueError: an argument out of its range, or less access than the attack needs.
    """

    name: str
    attack: Attack
    access: AccessName | None = None
    budget: int | None = None
    target: Target = "none"
    max_samples: int | None = None
    pool: int = 512
    draws: int | None = None
    surrogate: str | None = None
    answers: int = 1
    confirm: int | None = None
    chunk: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool | None = None
    compile: bool = False
    output: Output = "logits"

    def __post_init__(self) -> None:
        legal = all(letter.isalnum() or letter in "._-+" for letter in self.name)
        if not legal or self.name[:1] in ("", "."):
            raise ValueError(
                f"name becomes part of files and metrics: letters, digits, '.', '_' and '-', got {self.name!r}"
            )
        if self.target not in ("none", "next", "random", "least_likely"):
            raise ValueError(f"target must be none, next, random or least_likely, got {self.target!r}")
        if self.pool < 1 or (self.max_samples is not None and self.max_samples < 1):
            raise ValueError(f"pool and max_samples must be at least 1, got {self.pool} and {self.max_samples}")
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"draws must be at least 1 or None, got {self.draws}")
        if self.access is not None and self.access not in ("label", "probs", "logits", "gradient"):
            raise ValueError(f"access must be label, probs, logits, gradient or None, got {self.access!r}")
        if self.budget is not None and (not isinstance(self.budget, int) or self.budget < 0):
            raise ValueError(f"budget must be a whole number of queries per image from 0, or None, got {self.budget!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.output not in ("logits", "log_probs", "probs", "labels"):
            raise ValueError(f"output must be logits, log_probs, probs or labels, got {self.output!r}")
        if self.output == "labels" and self.attack.access > Access.LABEL:
            raise ValueError(
                f"{self.name}: a model with output 'labels' grants access 'label', and {type(self.attack).__name__} "
                f"needs {self.attack.access.name.lower()!r}: choose a decision-based attack, e.g. HopSkipJump"
            )
        if self.granted < self.attack.access:
            raise ValueError(
                f"{self.name}: access {self.access!r} is less than {type(self.attack).__name__} needs, "
                f"{self.attack.access.name.lower()!r}: grant that, or leave access out"
            )

    @property
    def hastened(self) -> bool:
        """Whether a cheaper stand-in for the model is to answer the search."""
        return self.precision != "fp32" or bool(self.channels_last) or self.compile

    @property
    def granted(self) -> Access:
        """What the attack may see."""
        return self.attack.access if self.access is None else Access[self.access.upper()]


def identity(protocol: Protocol) -> dict[str, Any]:
    """All of a protocol that decides the record of an image: neither how many nor how fast."""
    free = ("name", "max_samples", "pool", "chunk")
    return {name: value for name, value in vars(protocol).items() if name not in free}
