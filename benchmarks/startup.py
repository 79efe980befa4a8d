"""What it takes until the command line answers, against importing the libraries it stands on."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from measure import Comparison, in_turn

ROOT = Path(__file__).resolve().parents[1]


def compare(repetitions: int) -> Comparison:
    """Processor seconds of ``evaluate.py --help`` and of bare imports, each in a process of its own."""
    baseline = [sys.executable, "-c", "import pytorch_lightning, torchvision"]
    ours = [sys.executable, str(ROOT / "evaluate.py"), "--help"]
    _run(baseline)
    _run(ours)  # files are in memory and byte code is written from here on
    base, took = in_turn(lambda: _run(baseline), lambda: _run(ours), repetitions, _children)
    return Comparison("start-up", 1.5, "evaluate.py --help", base, took)


def _run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip().splitlines()[-1:]}")


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
