"""The first look at a model under trial: what it answers, and whether it would answer the same again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_adv.answers import Output, cast, check_answer, check_finite, dtype_of, evaluating
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.protocol import Target

_CLEAN, _AGAIN = -6, 16  # key of the draws; images that are asked about a second time
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}


class Sight(NamedTuple):
    """What the first look tells: the number of classes, 0 if unknown; whether the model answers the same again."""

    classes: int
    repeats: bool


def first_look(model: nn.Module, x: Tensor, output: Output, num_classes: int | None, seed: int) -> Sight:
    """Learn the number of classes, hold it against the data's, and refuse what is no classifier.

    Some of the images are asked about again, in other company: a model that says nothing of being random must repeat
    its answers.

    Args:
        x: clean images of one forward (n, C, H, W).
        num_classes: of the data set; None: not known.

    Raises:
        TypeError, ValueError: no answers of a classifier, or of one for other data.
    """
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        answer = ask(model, x, seed, torch.arange(len(x), device=x.device))
        if output != "labels" and isinstance(answer, Tensor) and answer.shape == x.shape[:1]:
            raise ValueError(
                f"{type(model).__name__} returns one label per image and no {output}: say output='labels' and choose "
                "an attack that needs access 'label', e.g. HopSkipJump"
            )
        check_answer(answer, len(x), output, model)
        if output == "labels":
            classes = num_classes or 0
        else:
            check_finite(answer, model)
            classes = answer.shape[1] - (getattr(model, "reject", None) is not None)
        if num_classes is not None and classes != num_classes:
            raise ValueError(
                f"{type(model).__name__} answers {classes} classes and the data set has {num_classes}: "
                "choose the data the model was trained on"
            )
        return Sight(classes, getattr(model, "stochastic", False) or _repeats(model, x, answer, seed))


def ask(model: nn.Module, x: Tensor, seed: int, index: Tensor) -> Tensor:
    """The deployed answers to clean images, with draws of their own for a random model."""
    given = {}
    if getattr(model, "stochastic", False):
        given = {"draws": Draws(seed, index, torch.zeros_like(index), _CLEAN)}
    return model(cast(x, model), **given)


def least_likely(model: nn.Module, x: Tensor, y: Tensor, index: Tensor, classes: int, seed: int, chunk: int) -> Tensor:
    """The clean image's least likely class other than its own, (n,) int64."""
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        parts = zip(torch.split(x, chunk), torch.split(index, chunk), strict=True)
        scores = torch.cat([ask(model, images, seed, places) for images, places in parts])[:, :classes]
    return scores.scatter(1, y[:, None], torch.inf).argmin(1)


def targets(
    rule: Target, model: nn.Module, x: Tensor, y: Tensor, index: Tensor, classes: int, seed: int, chunk: int
) -> Tensor | None:
    """Target classes by a rule, keyed by (seed, index) where they are drawn; None: untargeted.

    Args:
        classes: of the data set. chunk: images in a forward, for the least likely class.

    Shape: x (n, C, H, W), y and index (n,) -> (n,) int64.
    """
    if rule == "none":
        return None
    if rule == "next":
        return (y + 1) % classes
    if rule == "random":
        return (y + 1 + Draws(seed, index, torch.full_like(index, -5)).integers(classes - 1)) % classes
    return least_likely(model, x, y, index, classes, seed, chunk)


def _repeats(model: nn.Module, x: Tensor, answer: Tensor, seed: int) -> bool:
    few = min(_AGAIN, -(-len(x) // 2))
    first = answer[:few]
    again = ask(model, x[:few], seed, torch.arange(few, device=x.device))
    if not first.is_floating_point():
        return torch.equal(first, again)
    half = torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu"  # there even float32 is often rounded
    share = 0.05 if half else _ROUNDING.get(dtype_of(model) or x.dtype, 0.05)
    first, again = first.double(), again.double()
    size = float(first.abs().nan_to_num(0, 0, 0).amax()) if len(first) else 0.0
    return torch.allclose(first, again, rtol=0, atol=share * size, equal_nan=True)


class Restless(Defense):
    """A model that turned out not to repeat its answers, judged like a random one; its numbers are not keyed.

    Args:
        model: images (n, C, H, W) to whatever it answers.
    """

    stochastic = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.reject = model, getattr(model, "reject", None)

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        return self.model(x)
