"""What g does to images, how well a network imitates it, and how the loss rises along an attack."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_adv.answers import evaluating
from lit_adv.archive import weights_hash
from lit_adv.datamodules import Batch
from lit_adv.defenses.adversarial_transformation import AdversarialTransformation
from lit_adv.defenses.transformation_attacks import transformed
from lit_adv.experiments.page import Curve, figure
from lit_adv.experiments.transformation import cosines
from lit_adv.losses import cross_entropy
from lit_adv.oracle import QueryOracle
from lit_adv.tables import percent
from lit_adv.threat import ThreatModel

SMOOTH = ("softsign", "tanh", "softsign_scaled", "tanh_scaled")
STEPS = (1, 2, 5, 13)


class Errors(NamedTuple):
    """Mean squared errors per element against g(x), over fresh draws, and how far E g(x) lies from x.

    Attributes:
        network: of h(x). image: of x itself. mean: of E g(x), as estimated from other draws.
        least: the variance of g, below which nothing can come; estimated without bias.
        shift: mean absolute value of x - E g(x). largest: the mean over images of its largest absolute value.
    """

    network: float
    image: float
    mean: float
    least: float
    shift: float
    largest: float


def imitation(network: nn.Module, defence: nn.Module, x: Tensor, index: Tensor, draws: int, seed: int = 0) -> Errors:
    """How well h imitates g, beside predictors that need no training.

    Args:
        network: h, images to images. defence: has ``transform``.
        index: places of the images in their data set, (n,). draws: of g for E g(x), and as many for the errors.

    Raises:
        ValueError: fewer than 2 draws.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2 for a variance, got {draws}")
    with evaluating(network, defence), torch.no_grad():
        made = network(x).double()
        total, squares = torch.zeros_like(made), torch.zeros_like(made)
        for number in range(draws):
            z = transformed(defence, x, index, number, seed).double()
            total, squares = total + z, squares + z.square()
        mean = total / draws
        variance = ((squares - draws * mean.square()) / (draws - 1)).mean()
        errors = torch.zeros(3, dtype=torch.float64, device=x.device)
        for number in range(draws, 2 * draws):
            z = transformed(defence, x, index, number, seed).double()
            errors += torch.stack([(guess - z).square().mean() for guess in (made, x.double(), mean)])
    off = (x.double() - mean).abs().flatten(1)
    network_error, image_error, mean_error = (errors / draws).tolist()
    return Errors(network_error, image_error, mean_error, variance.item(), off.mean().item(), off.amax(1).mean().item())


class Ascent(NamedTuple):
    """A PGD from its first to its last step: mean loss of the deployed model, and share of wrong draws, after each.

    The first entries are those of the clean images.
    """

    loss: list[float]
    wrong: list[float]


def ascent(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    surrogate: str | None = None,
    eot: int = 1,
    judges: int = 8,
    index: Tensor | None = None,
    seed: int = 0,
) -> Ascent:
    """The cross-entropy of the true label along the steps of PGD from the clean image, none of which is left out.

    Args:
        surrogate: what gradients go through. eot: draws over which they are averaged.
        judges: fresh draws of the deployed model over which loss and decision are taken after each step.
    """
    index = torch.arange(len(x), device=x.device) if index is None else index
    rows = torch.arange(len(x), device=x.device)
    asked = QueryOracle(model, len(x), surrogate=surrogate, index=index, seed=seed)
    judge = QueryOracle(model, len(x), index=index, seed=seed + 1)
    found = Ascent([], [])
    at = x
    with evaluating(model):
        for step in range(steps + 1):
            with torch.no_grad():
                scores = judge.scores(_repeated(at, judges), rows)
            found.loss.append(cross_entropy(scores, y).double().mean().item())
            found.wrong.append((scores.argmax(-1) != y[:, None]).double().mean().item())
            if step < steps:
                at = threat.project(at + step_size * threat.steepest(_slope(asked, at, y, rows, eot)), x)
    return found


def _slope(oracle: QueryOracle, x: Tensor, y: Tensor, rows: Tensor, eot: int) -> Tensor:
    """Gradient of the mean cross-entropy over fresh draws."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = cross_entropy(oracle.scores(_repeated(leaf, eot), rows), y).mean(1).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient


def _repeated(x: Tensor, times: int) -> Tensor:
    return x.unsqueeze(1).expand(len(x), times, *x.shape[1:])


def agreement(
    defence: AdversarialTransformation, x: Tensor, y: Tensor, surrogate: str, steps: Sequence[int]
) -> list[float]:
    """Mean cosine over images between a surrogate's gradient and that of BPDA-I, for several numbers of steps of g.

    Images with a gradient of 0 are left out. Without random start, so that both see the same g; f_a is the one at hand
    for every number.
    """
    fixed = (defence.variant(steps=number, random_start=False).eval() for number in steps)
    return [cosines(one, x, y, surrogate).nanmean().item() for one in fixed]


def measures(
    network: nn.Module, defence: AdversarialTransformation, batch: Batch, train: Batch, given: argparse.Namespace
) -> list[str]:
    """What g does, what h learns of it, how gradients agree, and the figure of the loss: a note each.

    Args:
        network: h. batch: test images. train: training images.
        given: flags of the experiment: folder, images, draws, eps, steps, eot, curve_images, curve_steps.
    """
    notes = []
    for name, (x, _, index) in (("training", train), ("test", batch)):
        x, index = x[: given.images], index[: given.images]
        known = [weights_hash(network), weights_hash(defence), name, len(x), given.draws]
        e = Errors(
            *kept(given, f"imitation_{name}", known, partial(imitation, network, defence, x, index, given.draws))
        )
        notes.append(
            f"imitation of g on {len(x)} {name} images, squared error per element: h {e.network:.5f}, x itself "
            f"{e.image:.5f}, E g(x) {e.mean:.5f}; the variance of g, the least there is, {e.least:.5f}. "
            f"x - E g(x): mean absolute value {e.shift:.4f}, largest of an image {e.largest:.4f}"
        )
    x, y, index = (part[: given.curve_images] for part in batch)
    for surrogate in SMOOTH:
        known = [weights_hash(defence), surrogate, len(x)]
        found = kept(given, "cosine", known, partial(agreement, defence, x, y, surrogate, STEPS))
        told = ", ".join(f"N {number}: {value:.3f}" for number, value in zip(STEPS, found, strict=True))
        notes.append(f"cosine of the gradients of BPDA {surrogate} and BPDA-I, no random start, this f_a: {told}")
    return [*notes, curves(defence, Batch(x, y, index), given)]


def curves(defence: AdversarialTransformation, batch: Batch, given: argparse.Namespace) -> str:
    """Draw the loss along several attacks; what the figure shows, in words."""
    drawn, told = [], []
    ball, size = ThreatModel("linf", given.eps), 2.5 * given.eps / given.steps
    attacks = (
        (f"BPDA-I, S {given.eot}", None, given.eot),
        ("BPDA-I, S 1", None, 1),
        (f"BPDA softsign scaled, S {given.eot}", "softsign_scaled", given.eot),
        ("white-box transfer", "classifier", 1),
    )
    x, y, index = batch
    for name, surrogate, eot in attacks:
        judges = max(2, given.eot)
        known = [weights_hash(defence), surrogate, eot, len(x), given.eps, size, given.curve_steps, judges]
        make = partial(ascent, defence, x, y, ball, given.curve_steps, size, surrogate, eot, judges, index)
        found = Ascent(*kept(given, "ascent", known, make))
        drawn.append(Curve(name, list(range(len(found.loss))), found.loss))
        told.append(f"{name}: {found.loss[0]:.2f} to {found.loss[-1]:.2f}, wrong draws {percent(found.wrong[-1])} %")
    title = f"linf, eps {given.eps:g}, {len(x)} images"
    path = figure(given.folder / "loss.png", drawn, "step", "mean cross-entropy of the deployed model", title)
    return f"mean loss from the clean image to step {given.curve_steps} ({path.name}): " + "; ".join(told)


def kept(given: argparse.Namespace, name: str, known: Sequence[object], make: Callable[[], Any]) -> Any:
    """A figure made once: it lies in a file named after all that decides it."""
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    path = given.folder / "figures" / f"{name}_{digest}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(make()))
        os.replace(part, path)
    return json.loads(path.read_text())
