"""How other libraries are called: each adapter sets an attack up as nearly to the task as its arguments allow.

The libraries are imported when an adapter is set up, and are no dependency of the project.
"""

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(images, labels, targets or None) -> adversarial images``."""
Form = Literal["near", "batch", "single", "own"]
Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Task:
    """What all attackers of one kind are given: the norm, the radius and the queries per image."""

    norm: Norm
    eps: float
    budget: int


@dataclass(frozen=True)
class Peer:
    """One library's attack.

    Attributes:
        library: where it comes from. module: what is imported.
        words: its settings, beside those of the task.
        prepare: sets the attack up; not timed.
        form: how the images that reach the model are told apart. ``near``: all lie in the ball around their clean
            image. ``batch``: each forward holds all images in order. ``single``: the library works image by image,
            so it is given them one at a time. ``own``: a ledger tells, held against the count at the model.
        altered: the library was changed for this; shown for what it tells, and left out of comparisons.
    """

    library: str
    module: str
    words: str
    prepare: Callable[[nn.Module, Task], Run]
    form: Form
    altered: bool = False

    def sized(self, task: Task) -> "Peer":
        """With the task's figures in the words."""
        return replace(self, words=self.words.format(**_figures(task)))


# figures that follow from the budget
SAMPLES, SIGMA, STEP = 50, 0.01, 0.03  # of NES and SPSA: queries of a step, length of a probe and of a step
SIMBA_STEP, BOUNDARY_STEPS = 0.2, 20


def _figures(task: Task) -> dict[str, int]:
    return {
        "steps": task.budget // SAMPLES,
        "budget": task.budget,
        "third": task.budget // 3,
        "half": task.budget // 2,
        "generations": task.budget // 10,
        "jumps": jumps(task.budget),
        "iterations": task.budget // 257,
        "walks": walks(task.budget),
        "paces": task.budget // BOUNDARY_STEPS,
    }


def jumps(budget: int) -> int:
    """Steps of HopSkipJump that a budget covers: 100 sqrt(t) samples each, some 20 queries besides, and the start."""
    left, steps = budget - 50, 0
    while left >= (price := 20 + int(100 * math.sqrt(steps + 1))):
        left, steps = left - price, steps + 1
    return max(1, steps)


def walks(budget: int) -> int:
    """Steps of Foolbox's Boundary: one query each, every tenth two, after at most 51 for the start."""
    return int((budget - 60) / 1.1)


def _art(net: nn.Module, probabilities: bool = False) -> Any:
    """ART's classifier; float64 images, which some of its attacks send, are cast."""
    classifier = importlib.import_module("art.estimators.classification").PyTorchClassifier
    model = nn.Sequential(_Float32(), net, *([nn.Softmax(1)] if probabilities else []))
    return classifier(
        model.eval(),
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


class _Float32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """The images in single precision."""
        return x.float()


def _by_art(attack: Any) -> Run:
    def run(x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        labels = np.eye(10, dtype=np.float32)[(y if target is None else target).numpy()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(np.asarray(attack.generate(x=x.numpy().copy(), y=labels))).float()

    return run


def _art_attack(name: str) -> Any:
    return getattr(importlib.import_module("art.attacks.evasion"), name)


def art_nes(net: nn.Module, task: Task) -> Run:
    """Projected gradient with the query-efficient estimator."""
    estimators = importlib.import_module("art.estimators.classification")
    wrapped = _art_estimator(estimators, _art(net, probabilities=True))
    module = importlib.import_module(
        "art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_numpy"
    ).ProjectedGradientDescentNumpy
    steps = task.budget // SAMPLES
    return _by_art(
        module(wrapped, norm=np.inf, eps=task.eps, eps_step=STEP, max_iter=steps, batch_size=1024, verbose=False)
    )


def _art_estimator(estimators: Any, classifier: Any) -> Any:
    kind = importlib.import_module("art.estimators.classification.query_efficient_bb")
    return kind.QueryEfficientGradientEstimationClassifier(classifier, SAMPLES // 2, SIGMA, round_samples=0.0)


def art_square(net: nn.Module, task: Task) -> Run:
    """Square; three forwards a step."""
    attack = _art_attack("SquareAttack")(
        _art(net), norm=np.inf, eps=task.eps, max_iter=task.budget // 3, p_init=0.8, batch_size=256, verbose=False
    )
    return _by_art(attack)


def art_simba(net: nn.Module, task: Task) -> Run:
    """SimBA over pixels; two queries a step."""
    classifier = _art(net, probabilities=True)
    attack = _art_attack("SimBA")(
        classifier, attack="px", max_iter=task.budget // 2, epsilon=SIMBA_STEP, freq_dim=28, verbose=False
    )
    return _by_art(attack)


def art_hop_skip_jump(net: nn.Module, task: Task) -> Run:
    """HopSkipJump."""
    attack = _art_attack("HopSkipJump")(
        _art(net),
        norm=2 if task.norm == "l2" else np.inf,
        max_iter=jumps(task.budget),
        init_eval=100,
        batch_size=256,
        verbose=False,
    )
    return _by_art(attack)


def art_boundary(net: nn.Module, task: Task) -> Run:
    """The boundary attack; some 20 queries a step."""
    attack = _art_attack("BoundaryAttack")(
        _art(net), targeted=False, max_iter=task.budget // BOUNDARY_STEPS, sample_size=10, batch_size=256, verbose=False
    )
    return _by_art(attack)


def art_zoo(net: nn.Module, task: Task) -> Run:
    """ZOO, Adam over 128 coordinates a step; its probes are evaluated one by one."""
    return _by_art(_art_zoo(net, task))


def art_zoo_in_batches(net: nn.Module, task: Task) -> Run:
    """The same with the probes evaluated in batches, which its arguments do not allow."""
    attack = _art_zoo(net, task)
    predict = attack.estimator.predict
    attack.estimator.predict = lambda x, batch_size=256: predict(x, batch_size=256)
    return _by_art(attack)


def _art_zoo(net: nn.Module, task: Task) -> Any:
    return _art_attack("ZooAttack")(
        _art(net),
        learning_rate=0.03,
        max_iter=task.budget // 257,
        initial_const=10.0,
        abort_early=False,
        use_resize=False,
        use_importance=False,
        nb_parallel=128,
        batch_size=1,
        verbose=False,
    )


def _by_foolbox(net: nn.Module, attack: Any, **extra: Any) -> Run:
    foolbox = importlib.import_module("foolbox")
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")

    def run(x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        aim = foolbox.Misclassification(y) if target is None else foolbox.TargetedMisclassification(target)
        found: Tensor = attack.run(model, x, aim, **extra)
        return found.detach()

    return run


def foolbox_nes(net: nn.Module, task: Task) -> Run:
    """Projected gradient with the evolutionary estimator."""
    attacks = importlib.import_module("foolbox.attacks")
    estimator = importlib.import_module("foolbox.gradient_estimators").es_gradient_estimator
    kind = estimator(attacks.LinfPGD, samples=SAMPLES - 2, sigma=SIGMA, bounds=(0, 1), clip=True)
    attack = kind(abs_stepsize=STEP, steps=task.budget // SAMPLES, random_start=False)
    return _by_foolbox(net, attack, epsilon=task.eps)


def foolbox_hop_skip_jump(net: nn.Module, task: Task) -> Run:
    """HopSkipJump."""
    attacks = importlib.import_module("foolbox.attacks")
    constraint = "l2" if task.norm == "l2" else "linf"
    return _by_foolbox(net, attacks.HopSkipJumpAttack(steps=jumps(task.budget), constraint=constraint))


def foolbox_boundary(net: nn.Module, task: Task) -> Run:
    """The boundary attack."""
    attacks = importlib.import_module("foolbox.attacks")
    return _by_foolbox(net, attacks.BoundaryAttack(steps=walks(task.budget)))


def foolbox_gen_attack(net: nn.Module, task: Task) -> Run:
    """GenAttack; targeted only."""
    attacks = importlib.import_module("foolbox.attacks")
    return _by_foolbox(net, attacks.GenAttack(steps=task.budget // 10, population=10), epsilon=task.eps)


def _by_torchattacks(attack: Any) -> Run:
    def run(x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        found: Tensor = attack(x, y)
        return found.detach()

    return run


def torchattacks_square(net: nn.Module, task: Task) -> Run:
    """Square."""
    torchattacks = importlib.import_module("torchattacks")
    return _by_torchattacks(torchattacks.Square(net, norm="Linf", eps=task.eps, n_queries=task.budget))


def torchattacks_spsa(net: nn.Module, task: Task) -> Run:
    """SPSA."""
    torchattacks = importlib.import_module("torchattacks")
    attack = torchattacks.SPSA(
        net, eps=task.eps, delta=SIGMA, lr=STEP, nb_iter=task.budget // SAMPLES, nb_sample=SAMPLES // 2
    )
    return _by_torchattacks(attack)


ART, FOOLBOX, TORCHATTACKS = ("ART", "art"), ("Foolbox", "foolbox"), ("torchattacks", "torchattacks")

PEERS: dict[str, list[Peer]] = {
    "NES": [
        Peer(*ART, "PGD by its estimator: {steps} x 25 pairs, sigma 0.01, step 0.03", art_nes, "near"),
        Peer(*FOOLBOX, "PGD by its estimator: {steps} x (24 pairs + 1), sigma 0.01, step 0.03", foolbox_nes, "single"),
    ],
    "SPSA": [
        Peer(*TORCHATTACKS, "{steps} x 25 pairs, delta 0.01, Adam 0.03", torchattacks_spsa, "near"),
    ],
    "Square": [
        Peer(*TORCHATTACKS, "{budget} queries, p 0.8", torchattacks_square, "near"),
        Peer(*ART, "{third} steps of 3 queries, p 0.8", art_square, "near"),
    ],
    "SimBA": [Peer(*ART, "pixels, {half} steps of 2 queries, step 0.2", art_simba, "single")],
    "HopSkipJump": [
        Peer(*ART, "{jumps} steps from 100 samples", art_hop_skip_jump, "single"),
        Peer(*FOOLBOX, "{jumps} steps from 100 samples, all images in a batch", foolbox_hop_skip_jump, "batch"),
        Peer(*FOOLBOX, "{jumps} steps from 100 samples, image by image", foolbox_hop_skip_jump, "single"),
    ],
    "Boundary": [
        Peer(*ART, "{paces} steps of 10 samples", art_boundary, "single"),
        Peer(*FOOLBOX, "{walks} steps", foolbox_boundary, "batch"),
    ],
    "GenAttack": [Peer(*FOOLBOX, "{generations} generations of 10, targeted", foolbox_gen_attack, "near")],
    "ZOO": [
        Peer(*ART, "{iterations} steps of 257, lr 0.03, c 10", art_zoo, "single"),
        Peer(*ART, "the same, its predict altered to batches of 256", art_zoo_in_batches, "single", altered=True),
    ],
}
