"""Peak memory of attacks, with few and with many images, and with small and large populations.

    python benchmarks/memory.py [--images 64 1024] [--samples 100 400] [--budget 500] [--only nattack square]
    python benchmarks/memory.py --only pgd-eot apgd-eot deepfool-eot [--eot 8 64] [--eot-chunk 32]

A small network on MNIST under a radius that breaks no image, so that every query is asked. Each case runs in a process
of its own; what is printed is its peak beyond that of one full forward with model, images and ledger in memory. On a
CUDA device it is the peak of the allocator.

The second table is of gradients averaged over a random model's draws, on Model A with random weights and a little
noise: MB beyond model and images, in chunks of 32 images. Goal: less than 10 % more for eight times as many draws.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from nets import MnistSmall, mnist_small, right_images
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_adv.attack import Attack
from lit_adv.attacks import APGD, PGD, ZOO, Boundary, DeepFool, GenAttack, HopSkipJump, NAttack, SimBA, Square
from lit_adv.defense import Defense
from lit_adv.draws import Draws
from lit_adv.estimators import NES, SPSA, Autograd, Bandits, FiniteDifference
from lit_adv.models import ModelA
from lit_adv.oracle import QueryOracle
from lit_adv.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 1e-4), ThreatModel("l2", 1e-4)
STEPS = 100_000
# from a population to an attack; those without one are not measured twice
POPULATIONS: dict[str, Callable[[int], Attack]] = {
    "nattack": lambda samples: NAttack(LINF, steps=STEPS, samples=samples),
    "pgd-nes": lambda samples: PGD(LINF, steps=STEPS, estimator=NES(samples=samples)),
    "pgd-spsa": lambda samples: PGD(LINF, steps=STEPS, estimator=SPSA(directions=samples // 2)),
    "hop_skip_jump": lambda samples: HopSkipJump(L2, steps=STEPS, samples=samples),
    "gen_attack": lambda samples: GenAttack(LINF, steps=STEPS, population=samples),
    "zoo": lambda samples: ZOO(L2, steps=STEPS, coordinates=samples),
}
OTHERS: dict[str, Callable[[int], Attack]] = {
    "pgd-differences": lambda _: PGD(LINF, steps=STEPS, estimator=FiniteDifference()),
    "pgd-bandits": lambda _: PGD(LINF, steps=STEPS, estimator=Bandits(tile=None)),
    "square": lambda _: Square(LINF, steps=STEPS),
    "simba": lambda _: SimBA(L2, steps=STEPS),
    "boundary": lambda _: Boundary(L2, steps=STEPS),
}
# from a number of draws to an attack
EOT_STEPS, EOT_IMAGES = 2, 16
DRAWS: dict[str, Callable[[int], Attack]] = {
    "pgd-eot": lambda eot: PGD(LINF, EOT_STEPS, estimator=Autograd(eot)),
    "apgd-eot": lambda eot: APGD(LINF, EOT_STEPS, eot=eot),
    "deepfool-eot": lambda eot: DeepFool(L2, EOT_STEPS, classes=4, eot=eot),
}
CASES = POPULATIONS | OTHERS
MORE = 1.10  # goal: peak with most draws over that with fewest


class Noisy(Defense):
    """Model A with random weights behind a little noise."""

    num_classes, stochastic = 10, True

    def __init__(self) -> None:
        super().__init__()
        self.classifier = ModelA()

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Logits (n, 10)."""
        noise = torch.randn_like(x) if draws is None else draws.normal(*x.shape[1:], dtype=x.dtype)
        logits: Tensor = self.classifier(x + 1e-6 * noise)
        return logits


def main() -> None:
    """Measure each case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--budget", type=int, default=500, help="queries per image")
    parser.add_argument("--chunk", type=int, default=256, help="images per forward")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eot", type=int, nargs="+", default=[8, 64], help="draws of a random model")
    parser.add_argument("--eot-chunk", type=int, default=32, help="images per forward, with draws")
    parser.add_argument("--only", nargs="+", choices=[*CASES, *DRAWS], default=[*CASES, *DRAWS])
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        measured = measure_draws if options.case.split(" ")[0] in DRAWS else measure
        print(json.dumps(measured(options.case, options)))
        return
    tables = []
    if names := [name for name in options.only if name in CASES]:
        tables.append(_of_populations(names, options))
    if names := [name for name in options.only if name in DRAWS]:
        tables.append(_of_draws(names, options))
    for table in tables:
        Console().print(table)


def _of_populations(names: list[str], options: argparse.Namespace) -> Table:
    table = Table(title=f"Peak MB beyond one forward of {options.chunk} images, {options.budget} queries an image")
    for head in ("attack", "samples", *(f"{count:,} images" for count in options.images), "us per query"):
        table.add_column(head, justify="left" if head == "attack" else "right")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.pt"
        net = mnist_small()
        torch.save((net.state_dict(), *right_images(net, max(options.images))), path)
        for name in names:
            for samples in options.samples if name in POPULATIONS else [0]:
                found = [_in_process(f"{name} {samples} {count} {path}", options) for count in options.images]
                cost = found[-1]["seconds"] / max(1, found[-1]["queries"]) * 1e6
                megabytes = [f"{one['peak'] - one['forward']:.1f}" for one in found]
                row = (name, str(samples or ""), *megabytes, f"{cost:.1f}")
                table.add_row(*row)
                print(*row, file=sys.stderr, flush=True)  # it takes minutes
    return table


def _of_draws(names: list[str], options: argparse.Namespace) -> Table:
    """Peaks by the number of draws, the chunk given."""
    table = Table(title=f"Peak MB beyond Model A and {EOT_IMAGES} images, chunks of {options.eot_chunk}")
    draws = [f"eot {eot}" for eot in options.eot]
    for head in ("attack", "one forward and backward", *draws, f"most over fewest draws ({MORE:g})"):
        table.add_column(head, justify="left" if head == "attack" else "right")
    for name in names:
        found = [_in_process(f"{name} {eot}", options) for eot in options.eot]
        peaks = [one["peak"] for one in found]
        ratio = peaks[-1] / peaks[0]
        megabytes = [f"{one:.1f}" for one in (found[0]["one"], *peaks)]
        table.add_row(name, *megabytes, f"[{'green' if ratio < MORE else 'red'}]{ratio:.3f}[/]")
        print(name, *megabytes, f"{ratio:.3f}", file=sys.stderr, flush=True)
    return table


def measure(case: str, options: argparse.Namespace) -> dict[str, float]:
    """MB at the peak of one full forward and at the peak of the attack, and what that took."""
    name, samples, count, path = case.split(" ", 3)
    torch.set_num_threads(1)
    weights, x, y = torch.load(path, weights_only=True)
    net = MnistSmall()
    net.load_state_dict(weights)
    device = torch.device(options.device)
    net.eval().requires_grad_(False).to(device)
    x, y = x[: int(count)].clone().to(device), y[: int(count)].clone().to(device)
    oracle = QueryOracle(net, len(x), budget=options.budget, chunk=options.chunk, known_right=True)
    attack = CASES[name](int(samples))
    attack(QueryOracle(net, 1, budget=2, chunk=options.chunk), x[:1], y[:1])  # what is loaded at first use
    peak_of(device, begin=True)
    with torch.no_grad():
        net(x[:1].repeat(options.chunk, 1, 1, 1))
    forward = peak_of(device)
    peak_of(device, begin=True)
    begun = time.process_time()
    result = attack(oracle, x, y)
    seconds = time.process_time() - begun
    return {
        "forward": forward, "peak": peak_of(device), "seconds": seconds, "queries": float(result.queries.sum())
    }  # fmt: skip


def measure_draws(case: str, options: argparse.Namespace) -> dict[str, float]:
    """MB that one forward and backward of a chunk takes, and the attack."""
    name, eot = case.split(" ")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(options.device)
    net = Noisy().eval().requires_grad_(False).to(device)
    x = torch.rand(max(EOT_IMAGES, options.eot_chunk), 1, 28, 28, device=device)
    with torch.no_grad():
        y = torch.cat([net(part) for part in torch.split(x, 16)]).argmax(1)

    def attack(images: int, draws: int) -> None:
        oracle = QueryOracle(net, images, chunk=options.eot_chunk, known_right=True)
        result = DRAWS[name](draws)(oracle, x[:images], y[:images])
        if result.success.any() and name != "deepfool-eot":
            raise RuntimeError(f"{name}: an image broke at eps 1e-4, so less was asked than was meant")

    def one_pass() -> None:
        leaf = x[: options.eot_chunk].clone().requires_grad_()
        torch.autograd.grad(net(leaf).sum(), leaf)

    attack(1, 1)  # what is loaded at first use
    return {"one": grown(one_pass, device), "peak": grown(lambda: attack(EOT_IMAGES, int(eot)), device)}


def grown(work: Callable[[], object], device: torch.device) -> float:
    """MB at the peak beyond what was held before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) / 2**20
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    else:
        before = peak_of(device)
    peak_of(device, begin=True)
    work()
    return peak_of(device) - before


def peak_of(device: torch.device, begin: bool = False) -> float:
    """Peak MB since the last call with ``begin``; of the whole process where the system cannot begin anew."""
    if device.type == "cuda":
        if begin:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    if begin:
        reset.write_text("5")  # see proc(5): the peak becomes what is resident now
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def _in_process(case: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--case", case]
    for name in ("budget", "chunk", "eot_chunk", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    # what is freed goes back to the system at once, else a process keeps by chance more or less of it
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"} if case.split(" ")[0] in DRAWS else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{case} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
