"""What all tests share: real images where there are any, one thread, seeded generators."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
NO_DATA = "no image data"

torch.set_num_threads(1)


def find_data() -> Path | None:
    """The folder of real data sets: the variable LIT_ADV_DATA, else shared/data beside the checkout."""
    for place in (os.environ.get("LIT_ADV_DATA"), REPOSITORY.parent / "shared" / "data"):
        if place and Path(place).is_dir():
            return Path(place)
    return None


def without_data(reason: str) -> None:
    """Skip for want of data, or fail where LIT_ADV_REQUIRE_DATA=1 says that data must be there."""
    message = f"{NO_DATA}: {reason}"
    if os.environ.get("LIT_ADV_REQUIRE_DATA") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def data_root() -> Path:
    """The folder of real data sets; skips where there is none."""
    root = find_data()
    if root is None:
        without_data("LIT_ADV_DATA is not set to a folder and ../shared/data does not exist")
    assert root is not None
    return root


@pytest.fixture
def image_data(data_root: Path) -> Callable[[str], Path]:
    """A function from one data set's folder, as "MNIST", to the folder of all; skips where it is absent."""

    def require(folder: str) -> Path:
        if not (data_root / folder).is_dir():
            without_data(f"{data_root} has no folder {folder}")
        return data_root

    return require


@pytest.fixture
def generator() -> torch.Generator:
    """A generator seeded with 0."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say, always, how many tests were skipped for want of data."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(isinstance(report.longrepr, tuple) and NO_DATA in report.longrepr[2] for report in skipped)
    terminalreporter.write_line(f"skipped for missing data: {count}")
