"""White-box attacks of ours and of other libraries, with the same settings as nearly as their arguments allow.

The libraries are imported when an adapter is set up, and are no dependency of the project.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from peers_adapters import (
    ART,
    FOOLBOX,
    TORCHATTACKS,
    Norm,
    Peer,
    Run,
    Task,
    _art,
    _art_attack,
    _by_art,
    _by_foolbox,
    _by_torchattacks,
)
from torch import Tensor, nn

from lit_adv.attack import Attack
from lit_adv.attacks import APGD, DDN, FAB, PGD, CarliniWagner, DeepFool
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

ADV_LIB = ("adv-lib", "adv_lib")

PGD_STEPS, LINF_STEP, L2_STEP = 40, 0.01, 0.1
SEARCHES, ITERATIONS, RATE, CONSTANT = 9, 200, 0.05, 0.01  # Carlini & Wagner's, as Foolbox, adv-lib and we have them
FIXED = 10.0  # c, where it is not searched
LINE_SEARCHES = 20  # of ART's own optimiser, each of up to 11 passes
DDN_STEPS, GAMMA, FIRST_NORM = 100, 0.05, 1.0
FOOL_STEPS, OVERSHOOT = 50, 0.02
APGD_STEPS, FAB_STEPS = 40, 40


@dataclass(frozen=True)
class Contest:
    """An attack's norm and radius, our side and the others'.

    Attributes:
        eps: the radius; inf where the nearest adversarial image is wanted.
        slow: so many passes that Model A gets fewer images.
    """

    norm: Norm
    eps: float
    ours: Peer
    peers: tuple[Peer, ...]
    slow: bool = False

    @property
    def task(self) -> Task:
        """What each of them is given; there is no budget."""
        return Task(self.norm, self.eps, 0)


def _peer(library: tuple[str, str], prepare: Callable[[nn.Module, Task], Run], words: str = "the same") -> Peer:
    return Peer(*library, words, prepare, "batch")


def _ours(make: Callable[[ThreatModel], Attack], words: str) -> Peer:
    def prepare(net: nn.Module, task: Task) -> Run:
        attack = make(ThreatModel(task.norm, task.eps))

        def run(x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
            return attack(QueryOracle(net, len(x), known_right=True), x, y, target).x_adv

        return run

    return Peer("lit_adv", "lit_adv", words, prepare, "own")


def _step(task: Task) -> float:
    return LINF_STEP if task.norm == "linf" else L2_STEP


def _number(task: Task) -> float:
    return np.inf if task.norm == "linf" else 2


# One step, and projected gradient ascent from the image itself: the same arithmetic everywhere.


def _our_pgd(threat: ThreatModel, steps: int, step_size: float) -> Attack:
    # all steps, as others do, so that the last image and not the first hit is compared
    return PGD(threat, steps, step_size, random_start=False, stop_at_hit=False)


def _foolbox_fgsm(net: nn.Module, task: Task) -> Run:
    attacks = importlib.import_module("foolbox.attacks")
    return _by_foolbox(net, attacks.LinfFastGradientAttack(random_start=False), epsilon=task.eps)


def _torchattacks_fgsm(net: nn.Module, task: Task) -> Run:
    return _by_torchattacks(importlib.import_module("torchattacks").FGSM(net, eps=task.eps))


def _art_fgsm(net: nn.Module, task: Task) -> Run:
    return _by_art(_art_attack("FastGradientMethod")(_art(net), norm=np.inf, eps=task.eps, batch_size=256))


def _foolbox_pgd(net: nn.Module, task: Task) -> Run:
    attacks = importlib.import_module("foolbox.attacks")
    kind = attacks.LinfPGD if task.norm == "linf" else attacks.L2PGD
    attack = kind(abs_stepsize=_step(task), steps=PGD_STEPS, random_start=False)
    return _by_foolbox(net, attack, epsilon=task.eps)


def _torchattacks_pgd(net: nn.Module, task: Task) -> Run:
    torchattacks = importlib.import_module("torchattacks")
    kind = torchattacks.PGD if task.norm == "linf" else torchattacks.PGDL2
    return _by_torchattacks(kind(net, eps=task.eps, alpha=_step(task), steps=PGD_STEPS, random_start=False))


def _art_pgd(net: nn.Module, task: Task) -> Run:
    attack = _art_attack("ProjectedGradientDescent")(
        _art(net),
        norm=_number(task),
        eps=task.eps,
        eps_step=_step(task),
        max_iter=PGD_STEPS,
        batch_size=256,
        verbose=False,
    )
    return _by_art(attack)


# Auto-PGD, which everyone starts at a random point of their own.


def _torchattacks_apgd(net: nn.Module, task: Task) -> Run:
    kind = importlib.import_module("torchattacks").APGD
    return _by_torchattacks(kind(net, norm="Linf", eps=task.eps, steps=APGD_STEPS, loss="ce"))


def _adv_lib_apgd(net: nn.Module, task: Task) -> Run:
    return _by_adv_lib(net, "apgd", eps=task.eps, norm=np.inf, n_iter=APGD_STEPS, loss_function="ce")


# Carlini & Wagner.


def _foolbox_cw(net: nn.Module, task: Task) -> Run:
    attack = importlib.import_module("foolbox.attacks").L2CarliniWagnerAttack(
        binary_search_steps=SEARCHES, steps=ITERATIONS, stepsize=RATE, initial_const=CONSTANT, abort_early=False
    )
    return _by_foolbox(net, attack)


def _adv_lib_cw(net: nn.Module, task: Task) -> Run:
    return _by_adv_lib(
        net,
        "carlini_wagner_l2",
        learning_rate=RATE,
        initial_const=CONSTANT,
        binary_search_steps=SEARCHES,
        max_iterations=ITERATIONS,
        abort_early=False,
    )


def _torchattacks_cw(net: nn.Module, task: Task) -> Run:
    kind = importlib.import_module("torchattacks").CW
    return _by_torchattacks(kind(net, c=FIXED, steps=SEARCHES * ITERATIONS, lr=RATE))


def _art_cw(net: nn.Module, task: Task) -> Run:
    attack = _art_attack("CarliniL2Method")(
        _art(net),
        binary_search_steps=SEARCHES,
        max_iter=LINE_SEARCHES,
        learning_rate=RATE,
        initial_const=CONSTANT,
        batch_size=256,
        verbose=False,
    )
    return _by_art(attack)


# DeepFool.


def _foolbox_deepfool(net: nn.Module, task: Task) -> Run:
    attacks = importlib.import_module("foolbox.attacks")
    kind = attacks.LinfDeepFoolAttack if task.norm == "linf" else attacks.L2DeepFoolAttack
    return _by_foolbox(net, kind(steps=FOOL_STEPS, candidates=10, overshoot=OVERSHOOT))


def _torchattacks_deepfool(net: nn.Module, task: Task) -> Run:
    kind = importlib.import_module("torchattacks").DeepFool
    return _by_torchattacks(kind(net, steps=FOOL_STEPS, overshoot=OVERSHOOT))


def _art_deepfool(net: nn.Module, task: Task) -> Run:
    attack = _art_attack("DeepFool")(
        _art(net), max_iter=FOOL_STEPS, epsilon=OVERSHOOT, nb_grads=10, batch_size=256, verbose=False
    )
    return _by_art(attack)


def _adv_lib_deepfool(net: nn.Module, task: Task) -> Run:
    return _by_adv_lib(net, "df", steps=FOOL_STEPS, overshoot=OVERSHOOT, norm=_number(task))


# Decoupled direction and norm; the fast adaptive boundary.


def _foolbox_ddn(net: nn.Module, task: Task) -> Run:
    attack = importlib.import_module("foolbox.attacks").DDNAttack(init_epsilon=FIRST_NORM, steps=DDN_STEPS, gamma=GAMMA)
    return _by_foolbox(net, attack)


def _adv_lib_ddn(net: nn.Module, task: Task) -> Run:
    # gamma by its place, for its name is Greek; no rounding to 8 bits
    return _by_adv_lib(net, "ddn", False, DDN_STEPS, GAMMA, init_norm=FIRST_NORM, levels=None)


def _torchattacks_fab(net: nn.Module, task: Task) -> Run:
    norm = "Linf" if task.norm == "linf" else "L2"
    return _by_torchattacks(importlib.import_module("torchattacks").FAB(net, norm=norm, eps=100.0, steps=FAB_STEPS))


def _adv_lib_fab(net: nn.Module, task: Task) -> Run:
    return _by_adv_lib(net, "fab", norm=_number(task), n_iter=FAB_STEPS)


def _by_adv_lib(net: nn.Module, name: str, *settings: Any, **named: Any) -> Run:
    if "visdom" not in sys.modules and importlib.util.find_spec("visdom") is None:
        sys.modules["visdom"] = ModuleType("visdom")  # which it imports for plots that nobody asks for
    attack = getattr(importlib.import_module("adv_lib.attacks"), name)

    def run(x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        found: Tensor = attack(net, x, y, *settings, **named)
        return found.detach()

    return run


_FGSM = (_peer(FOOLBOX, _foolbox_fgsm), _peer(TORCHATTACKS, _torchattacks_fgsm), _peer(ART, _art_fgsm))
_PGD = (_peer(FOOLBOX, _foolbox_pgd), _peer(TORCHATTACKS, _torchattacks_pgd), _peer(ART, _art_pgd))
_APGD = (_peer(TORCHATTACKS, _torchattacks_apgd), _peer(ADV_LIB, _adv_lib_apgd))
_CW = (
    _peer(FOOLBOX, _foolbox_cw),
    _peer(ADV_LIB, _adv_lib_cw),
    _peer(TORCHATTACKS, _torchattacks_cw, f"c fixed at {FIXED:g}, {SEARCHES * ITERATIONS} steps; black pixels stay"),
    _peer(ART, _art_cw, f"{SEARCHES} searches x {LINE_SEARCHES} line searches without Adam"),
)
_EACH, _LAST = "the same, overshoot at each step", "the same, overshoot at the end"
_FOOL_LINF = (_peer(FOOLBOX, _foolbox_deepfool), _peer(ADV_LIB, _adv_lib_deepfool, _EACH))
_FOOL_L2 = (
    *_FOOL_LINF,
    _peer(TORCHATTACKS, _torchattacks_deepfool, f"{_EACH}, nothing added: ends within rounding of the boundary"),
    _peer(ART, _art_deepfool, _LAST),
)
_DDN = (_peer(FOOLBOX, _foolbox_ddn), _peer(ADV_LIB, _adv_lib_ddn))
_FAB = (_peer(ADV_LIB, _adv_lib_fab), _peer(TORCHATTACKS, _torchattacks_fab))


def _our_fgsm(threat: ThreatModel) -> Attack:
    return _our_pgd(threat, 1, threat.radius)


def _our_cw(threat: ThreatModel) -> Attack:
    return CarliniWagner(threat, ITERATIONS, SEARCHES, step_size=RATE, constant=CONSTANT, abort_early=False)


def _pgd(norm: Norm, eps: float, step_size: float) -> Contest:
    words = f"{PGD_STEPS} x {step_size}, from the image"
    return Contest(norm, eps, _ours(partial(_our_pgd, steps=PGD_STEPS, step_size=step_size), words), _PGD)


_OUR_APGD = _ours(partial(APGD, steps=APGD_STEPS, stop_at_hit=False), f"{APGD_STEPS} steps, a random start")
_OUR_CW = _ours(_our_cw, f"{SEARCHES} searches x {ITERATIONS}, Adam {RATE}, c from {CONSTANT}, no early end")
_OUR_FOOL = _ours(
    partial(DeepFool, steps=FOOL_STEPS, overshoot=OVERSHOOT), f"{FOOL_STEPS} steps, overshoot {OVERSHOOT} of all steps"
)
_OUR_DDN = _ours(
    partial(DDN, steps=DDN_STEPS, gamma=GAMMA, initial=FIRST_NORM),
    f"{DDN_STEPS} steps, gamma {GAMMA}, from norm {FIRST_NORM:g}",
)
_OUR_FAB = _ours(partial(FAB, steps=FAB_STEPS), f"{FAB_STEPS} steps from the image")

CONTESTS = {
    "FGSM linf 0.1": Contest("linf", 0.1, _ours(_our_fgsm, "one step"), _FGSM),
    "PGD linf 0.1": _pgd("linf", 0.1, LINF_STEP),
    "PGD linf 0.3": _pgd("linf", 0.3, LINF_STEP),
    "PGD l2 2.0": _pgd("l2", 2.0, L2_STEP),
    "APGD-CE linf 0.1": Contest("linf", 0.1, _OUR_APGD, _APGD),
    "C&W l2": Contest("l2", math.inf, _OUR_CW, _CW, slow=True),
    "DeepFool l2": Contest("l2", math.inf, _OUR_FOOL, _FOOL_L2),
    "DeepFool linf": Contest("linf", math.inf, _OUR_FOOL, _FOOL_LINF),
    "DDN l2": Contest("l2", math.inf, _OUR_DDN, _DDN, slow=True),
    "FAB l2": Contest("l2", math.inf, _OUR_FAB, _FAB, slow=True),
    "FAB linf": Contest("linf", math.inf, _OUR_FAB, _FAB, slow=True),
}
