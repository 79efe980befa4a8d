"""Attacks against the physical limit: the bare passes through the model over as many images, at the best batch size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from measure import Clock, Comparison, in_turn, seconds
from torch import Tensor, nn

from lit_adv.attacks import PGD, NAttack
from lit_adv.models import DigitsNet, ModelA
from lit_adv.oracle import QueryOracle
from lit_adv.result import AttackResult
from lit_adv.threat import ThreatModel

UNREACHABLE = ThreatModel("linf", 1e-4)  # no image breaks, so all of them are asked about to the end


@dataclass(frozen=True)
class Case:
    """An attack on a model, and how many images it gets."""

    name: str
    model: nn.Module
    shape: tuple[int, int, int]
    attack: PGD | NAttack
    images: int
    sizes: tuple[int, ...]
    goal: float


@dataclass
class Count:
    """Images that a model has seen, counted at the model; those that are differentiated apart."""

    plain: int = 0
    differentiated: int = 0

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
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


def _nattack(
    name: str,
    model: nn.Module,
    shape: tuple[int, int, int],
    amount: tuple[int, int, int],
    sizes: tuple[int, ...],
    goal: float,
) -> Case:
    return Case(name, model, shape, NAttack(UNREACHABLE, steps=amount[1]), amount[0], sizes, goal)


def _pgd(
    name: str,
    model: nn.Module,
    shape: tuple[int, int, int],
    amount: tuple[int, int, int],
    sizes: tuple[int, ...],
    goal: float,
) -> Case:
    return Case(name, model, shape, PGD(UNREACHABLE, steps=amount[2]), 8 * amount[0], sizes, goal)


def compare(case: Case, device: torch.device, repetitions: int, clock: Clock) -> Comparison:
    """Time one attack against the passes that it made."""
    model = case.model.to(device).eval()
    x, y = _sure_images(model, case.images, case.shape, device)
    count = Count()
    handle = model.register_forward_pre_hook(count)
    _attack(case, model, x, y)
    handle.remove()
    differentiates = count.differentiated > 0
    size = _best_size(case, model, device, differentiates, clock)
    batch = torch.rand(size, *case.shape, device=device)

    def baseline() -> None:
        _passes(_forward_backward, model, batch, count.differentiated)
        _passes(_forward, model, batch, count.plain)

    base, ours = in_turn(baseline, lambda: _attack(case, model, x, y), repetitions, clock)
    kind = "forward and backward" if differentiates else "forward"
    work = f"{count.plain + count.differentiated:,} images, {kind}, best in batches of {size}"
    return Comparison(case.name, case.goal, work, base, ours)


def _attack(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> AttackResult:
    result: AttackResult = case.attack(QueryOracle(model, len(x)), x, y)
    if result.success.any():
        raise RuntimeError(f"{case.name}: an image broke at eps {UNREACHABLE.eps}, so the count of images is off")
    return result


def _sure_images(model: nn.Module, count: int, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The random images that the model is surest of, and its decisions on them."""
    x = torch.rand(4 * count, *shape, device=device)
    with torch.no_grad():
        top = torch.cat([model(part) for part in torch.split(x, 64)]).topk(2, dim=-1)
    chosen = (top.values[:, 0] - top.values[:, 1]).topk(count).indices
    return x[chosen], top.indices[chosen, 0]


def _best_size(case: Case, model: nn.Module, device: torch.device, differentiates: bool, clock: Clock) -> int:
    """The fastest batch size, each tried five times in turn."""
    one = _forward_backward if differentiates else _forward
    images = max(case.sizes)
    batches = {size: torch.rand(size, *case.shape, device=device) for size in case.sizes}
    fastest = dict.fromkeys(case.sizes, float("inf"))
    for _ in range(5):
        for size, batch in batches.items():
            took = seconds(lambda batch=batch: _passes(one, model, batch, images), clock)  # type: ignore[misc]
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


def _forward_backward(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(model(leaf).sum(), leaf)[0]
