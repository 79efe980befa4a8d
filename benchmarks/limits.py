"""Attacks against the physical limit: the bare passes through the model over as many images, at the best batch size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from measure import Clock, Comparison, in_turn, seconds
from nets import MnistSmall
from torch import Tensor, nn

from lit_adv.attack import Attack
from lit_adv.attacks import PGD, ZOO, Boundary, GenAttack, HopSkipJump, NAttack, SimBA, Square
from lit_adv.estimator import GradientEstimator
from lit_adv.estimators import NES, SPSA, Bandits
from lit_adv.models import DigitsNet, ModelA
from lit_adv.oracle import QueryOracle
from lit_adv.result import AttackResult
from lit_adv.threat import ThreatModel

TINY = 1e-4  # of a radius within which no image breaks, so that all are asked about to the end
LONG = 10**6  # steps: the budget ends first
MOST = {"linf": ThreatModel("linf", TINY), "l2": ThreatModel("l2", TINY)}


@dataclass(frozen=True)
class Case:
    """An attack on a model, how many images it gets, and the queries of each; None: its steps say when to end.

    Attributes:
        sizes: batch sizes that the baseline may choose from. goal: largest ratio that we want to see.
        backwards: single backward passes that the baseline makes after each forward that is differentiated.
    """

    name: str
    model: nn.Module
    shape: tuple[int, int, int]
    attack: Attack
    images: int
    sizes: tuple[int, ...]
    goal: float
    budget: int | None = None
    backwards: int = 1


@dataclass
class Count:
    """Images that a model has seen, counted at the model; those that are differentiated apart."""

    plain: int = 0
    differentiated: int = 0

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad and torch.is_grad_enabled():
            self.differentiated += len(inputs[0])
        else:
            self.plain += len(inputs[0])


def cases(quick: bool) -> list[Case]:
    """The measurements; quick ones do less of the same."""
    # (narrow images, population updates, PGD steps) on each net: one forward is 20 times dearer on Model A
    wide, digits = ((8, 1, 8), (32, 1, 40)) if quick else ((16, 1, 20), (64, 2, 100))
    model_a, digits_net = ModelA(), DigitsNet()
    few, many = (32, 64, 128), (64, 128, 256, 512, 1024)
    return [
        _nattack("NAttack, Model A", model_a, (1, 28, 28), wide, few, 1.10),
        _nattack("NAttack, digits net", digits_net, (1, 8, 8), digits, many, 1.40),
        _pgd("PGD, Model A", model_a, (1, 28, 28), wide, few, 1.10),
        _pgd("PGD, digits net", digits_net, (1, 8, 8), digits, many, 1.40),
    ]


def black_box_cases(quick: bool) -> list[Case]:
    """Every black-box attack on a network of 0.5 M multiply-adds and on Model A, of 45 M."""
    small, model_a = MnistSmall(), ModelA()
    nets = [
        ("small net", small, 2**16 if quick else 2**17, (128, 256, 512, 1024), 1.30),
        ("Model A", model_a, 2**12 if quick else 2**13, (16, 32, 64, 128), 1.05),
    ]
    return [
        Case(f"{name}, {where}", net, (1, 28, 28), attack, total // queries, sizes, own_goal or goal, queries)
        for where, net, total, sizes, goal in nets
        for name, attack, queries, own_goal in _black_box()
    ]


def _black_box() -> list[tuple[str, Attack, int, float | None]]:
    """Names, attacks, queries per image, and a goal of their own where a row proposes one new image a step.

    Those that ask one or two images of a row at a time get more rows, each with fewer queries.
    """
    linf, l2 = MOST["linf"], MOST["l2"]
    return [
        ("NES", _probing(NES(samples=50, sigma=0.01)), 640, None),
        ("SPSA", _probing(SPSA(directions=25, direction="signs")), 640, None),
        ("Bandits", _probing(Bandits(tile=14)), 128, None),
        ("NAttack", NAttack(linf, LONG, samples=100), 640, None),
        ("GenAttack", GenAttack(linf, LONG, population=10), 128, None),
        ("ZOO", ZOO(l2, LONG, 1, early_stop=None), 640, None),
        ("HopSkipJump", HopSkipJump(l2, LONG), 640, None),
        ("Square", Square(linf, LONG), 128, 1.5),
        ("SimBA", SimBA(l2, LONG), 128, 1.5),
        ("Boundary", Boundary(l2, LONG), 128, 1.5),
    ]


def _probing(estimator: GradientEstimator) -> PGD:
    return PGD(MOST["linf"], LONG, TINY / 10, random_start=False, estimator=estimator)


def _nattack(
    name: str,
    model: nn.Module,
    shape: tuple[int, int, int],
    amount: tuple[int, int, int],
    sizes: tuple[int, ...],
    goal: float,
) -> Case:
    return Case(name, model, shape, NAttack(MOST["linf"], steps=amount[1]), amount[0], sizes, goal)


def _pgd(
    name: str,
    model: nn.Module,
    shape: tuple[int, int, int],
    amount: tuple[int, int, int],
    sizes: tuple[int, ...],
    goal: float,
) -> Case:
    return Case(name, model, shape, PGD(MOST["linf"], steps=amount[2]), 8 * amount[0], sizes, goal)


def compare(case: Case, device: torch.device, repetitions: int, clock: Clock) -> Comparison:
    """Time one attack against the passes that it made."""
    model = case.model.to(device).eval()
    _balance(model, case.shape, device)
    x, y = _sure_images(model, case.images, case.shape, device)
    count = Count()
    handle = model.register_forward_pre_hook(count)
    charged = int(_attack(case, model, x, y).queries.sum())
    handle.remove()
    # what is forwarded twice is charged once; the baseline need not do so
    plain = charged - count.differentiated
    differentiates = count.differentiated > 0
    size = best_size(model, case.shape, case.sizes, clock, device, differentiates)
    batch = torch.rand(size, *case.shape, device=device)
    back = partial(_forward_backward, backwards=case.backwards)

    def baseline() -> None:
        _passes(back, model, batch, count.differentiated)
        _passes(_forward, model, batch, plain)

    base, ours = in_turn(baseline, lambda: _attack(case, model, x, y), repetitions, clock)
    kind = "forward and backward" if differentiates else "forward"
    kind += f" {case.backwards} times" if case.backwards > 1 else ""
    work = f"{charged:,} images, {kind}, best in batches of {size}"
    if count.plain > plain:
        work += f"; {count.plain - plain:,} forwards made twice"
    return Comparison(case.name, case.goal, work, base, ours)


def _attack(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> AttackResult:
    result: AttackResult = case.attack(QueryOracle(model, len(x), budget=case.budget), x, y)
    if result.success.any():
        raise RuntimeError(f"{case.name}: an image broke at eps {TINY}, so the count of images is off")
    return result


@torch.no_grad()
def _balance(model: nn.Module, shape: Sequence[int], device: torch.device) -> None:
    """Make an untrained network decide differently on different noise, where decision-based attacks begin."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.sub_(model(torch.rand(256, *shape, device=device)).mean(0))


def _sure_images(model: nn.Module, count: int, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The random images that the model is surest of, and its decisions on them."""
    x = torch.rand(4 * count, *shape, device=device)
    with torch.no_grad():
        top = torch.cat([model(part) for part in torch.split(x, 64)]).topk(2, dim=-1)
    chosen = (top.values[:, 0] - top.values[:, 1]).topk(count).indices
    return x[chosen], top.indices[chosen, 0]


def best_size(
    model: nn.Module,
    shape: Sequence[int],
    sizes: Sequence[int],
    clock: Clock,
    device: torch.device | None = None,
    differentiates: bool = False,
) -> int:
    """The fastest batch size of a forward, or of a forward and backward; each is tried five times in turn."""
    one = _forward_backward if differentiates else _forward
    batches = {size: torch.rand(size, *shape, device=device) for size in sizes}
    fastest = dict.fromkeys(sizes, float("inf"))
    for _ in range(5):
        for size, batch in batches.items():
            took = seconds(lambda batch=batch: _passes(one, model, batch, max(sizes)), clock)  # type: ignore[misc]
            fastest[size] = min(fastest[size], took)
    return min(fastest, key=lambda size: fastest[size])


def _passes(one: Callable[[nn.Module, Tensor], object], model: nn.Module, batch: Tensor, images: int) -> None:
    whole, rest = divmod(images, len(batch))
    for _ in range(whole):
        one(model, batch)
    if rest:
        one(model, batch[:rest])


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    answer: Tensor = model(x)
    return answer


def _forward_backward(model: nn.Module, x: Tensor, backwards: int = 1) -> None:
    leaf = x.detach().requires_grad_()
    total = model(leaf).sum()
    for left in reversed(range(backwards)):
        torch.autograd.grad(total, leaf, retain_graph=left > 0)
