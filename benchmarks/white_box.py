"""White-box attacks against the physical limit: the forwards and backwards that they cannot do without.

No image breaks within the tiny radius, so all are attacked to the last step. DeepFool ends once it has crossed the
boundary, however far away; its limit is one forward and as many single backwards a step as it compares classes.
"""

import statistics
from dataclasses import replace

import torch
from limits import MOST, TINY, Case, compare
from measure import Clock, Comparison
from nets import MnistSmall

from lit_adv.attack import Attack
from lit_adv.attacks import APGD, DDN, FAB, PGD, CarliniWagner, DeepFool
from lit_adv.models import ModelA

SHAPE = (1, 28, 28)
CLASSES = 10
SEARCHES = 2
LIMITS = {"small": (1.20, 1.30, 1.50), "large": (1.05, 1.10, 1.20)}
"""Goals of the attacks within a ball, of those that look for the nearest image, and of those by class gradients."""


def cases(quick: bool) -> list[Case]:
    """Every white-box attack on a network of 0.5 M multiply-adds and on Model A, of 45 M."""
    small = _on("small net", MnistSmall(), 2**15 if quick else 2**17, (64, 128, 256, 512, 1024), LIMITS["small"])
    return small + _on("Model A", ModelA(), 2**11 if quick else 2**13, (16, 32, 64, 128), LIMITS["large"])


def _on(
    where: str, net: torch.nn.Module, total: int, sizes: tuple[int, ...], goals: tuple[float, float, float]
) -> list[Case]:
    """The attacks on one network, each with about so many forwards and backwards in all."""
    linf, l2 = MOST["linf"], MOST["l2"]
    within, nearest, by_class = goals
    wanted: list[tuple[str, Attack, int, float, int]] = [
        ("FGSM", PGD(linf, 1, TINY, random_start=False), 4, within, 1),
        ("PGD-40", PGD(linf, 40, random_start=False), 40, within, 1),
        ("APGD-CE", APGD(linf, 40), 40, within, 1),
        ("C&W", CarliniWagner(l2, 20, SEARCHES, abort_early=False), 20 * SEARCHES, nearest, 1),
        ("DDN", DDN(l2, 40), 40, nearest, 1),
        ("DeepFool", DeepFool(l2), 4 * (CLASSES - 1), by_class, CLASSES - 1),
        ("FAB", FAB(l2, 10), 10 * (CLASSES - 1), by_class, CLASSES - 1),
    ]
    return [
        Case(f"{name}, {where}", net, SHAPE, attack, max(1, total // passes), sizes, goal, backwards=backwards)
        for name, attack, passes, goal, backwards in wanted
    ]


def measured(case: Case, device: torch.device, repetitions: int, clock: Clock) -> Comparison:
    """One attack against its passes, with the time of an image."""
    found = compare(case, device, repetitions, clock)
    each = 1000 * statistics.median(found.ours) / case.images
    return replace(found, work=f"{found.work}; {each:.2f} ms an attacked image")
