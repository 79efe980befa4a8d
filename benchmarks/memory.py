"""Peak memory of attacks, with few and with many images, and with small and large populations.

    python benchmarks/memory.py [--images 64 1024] [--samples 100 400] [--budget 500] [--only nattack square]

A small network on MNIST under a radius that breaks no image, so that every query is asked. Each case runs in a process
of its own; what is printed is its peak beyond that of one full forward with model, images and ledger in memory. On a
CUDA device it is the peak of the allocator.
"""

import argparse
import json
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

from lit_adv.attack import Attack
from lit_adv.attacks import PGD, ZOO, Boundary, GenAttack, HopSkipJump, NAttack, SimBA, Square
from lit_adv.estimators import NES, SPSA, Bandits, FiniteDifference
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
CASES = POPULATIONS | OTHERS


def main() -> None:
    """Measure each case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--budget", type=int, default=500, help="queries per image")
    parser.add_argument("--chunk", type=int, default=256, help="images per forward")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(options.case, options)))
        return
    table = Table(title=f"Peak MB beyond one forward of {options.chunk} images, {options.budget} queries an image")
    for head in ("attack", "samples", *(f"{count:,} images" for count in options.images), "us per query"):
        table.add_column(head, justify="left" if head == "attack" else "right")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.pt"
        net = mnist_small()
        torch.save((net.state_dict(), *right_images(net, max(options.images))), path)
        for name in options.only:
            for samples in options.samples if name in POPULATIONS else [0]:
                found = [_in_process(f"{name} {samples} {count} {path}", options) for count in options.images]
                cost = found[-1]["seconds"] / max(1, found[-1]["queries"]) * 1e6
                megabytes = [f"{one['peak'] - one['forward']:.1f}" for one in found]
                row = (name, str(samples or ""), *megabytes, f"{cost:.1f}")
                table.add_row(*row)
                print(*row, file=sys.stderr, flush=True)  # it takes minutes
    Console().print(table)


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
    for name in ("budget", "chunk", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
