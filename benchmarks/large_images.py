"""Black-box attacks at 224 x 224: time against the bare forward, and peak memory with few and with many samples.

    python benchmarks/large_images.py [--images 2] [--budget 500] [--samples 100 400] [--only nattack square bandits]

A torchvision ResNet-18 with random weights, ImageNet photographs, the model's own predictions as labels. Each case runs
in a process of its own, whose peak memory is measured beside that of the model with one forward of the same size.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import resnet18

from lit_adv.attack import Attack
from lit_adv.datamodules import ImageNet
from lit_adv.experiments.catalogue import protocol_of
from lit_adv.models import Normalize
from lit_adv.oracle import QueryOracle

CASES = {"nattack": "nattack_linf_imagenet", "square": "square_linf", "bandits": "bandits_linf"}
CHUNK = 16


def main() -> None:
    """Measure each case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--budget", type=int, default=500, help="queries per image")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 400], help="populations of NAttack")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        name, _, samples = options.case.partition("-")
        print(json.dumps(measure(name, int(samples or 0), options.images, options.budget)))
        return
    table = Table(title=f"ResNet-18 at 224 x 224, {options.images} images, {options.budget} queries each")
    for head in ("attack", "samples", "queries", "broken", "seconds", "x limit", "peak MB", "of it the attack's"):
        table.add_column(head, justify="left" if head == "attack" else "right")
    bare = _in_process("bare", options)
    for name in options.only:
        for samples in options.samples if name == "nattack" else [0]:
            found = _in_process(f"{name}-{samples}", options)
            limit = found["queries"] * bare["seconds"] / bare["queries"]
            table.add_row(
                name, str(samples or ""), f"{found['queries']:.0f}", f"{found['broken']:.0f}",
                f"{found['seconds']:.1f}", f"{found['seconds'] / limit:.2f}", f"{found['peak']:.0f}",
                f"{found['peak'] - bare['peak']:.0f}",
            )  # fmt: skip
    Console().print(table)


def measure(name: str, samples: int, images: int, budget: int) -> dict[str, float]:
    """Seconds, queries and peak memory of one case; ``bare``: forwards alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), resnet18()).eval()
    x = photographs(images)
    with torch.no_grad():
        y = model(x).argmax(1)
        for _ in range(2):
            model(x[:1].repeat(CHUNK, 1, 1, 1))
    begun = time.process_time()
    queries, broken = CHUNK * 8, 0
    if name == "bare":
        with torch.no_grad():
            for _ in range(8):
                model(x[:1].repeat(CHUNK, 1, 1, 1))
    else:
        oracle = QueryOracle(model, len(x), budget=budget, chunk=CHUNK, known_right=True)
        result = attack(name, samples)(oracle, x, y)
        queries, broken = int(result.queries.sum()), int(result.success.sum())
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "queries": queries, "broken": broken, "peak": peak}


def attack(name: str, samples: int) -> Attack:
    """An attack of the collection, with another population."""
    return protocol_of(CASES[name], attack={"samples": samples} if samples else None).attack


def photographs(count: int) -> Tensor:
    """The first photographs of the ImageNet samples."""
    data = ImageNet(folder="imagenet_samples", in_memory=True, batch_size=count, num_workers=0)
    data.prepare_data()
    data.setup("test")
    image: Tensor = next(iter(data.test_dataloader()))[0]
    return image


def _in_process(case: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--case", case]
    command += ["--images", str(options.images), "--budget", str(options.budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
