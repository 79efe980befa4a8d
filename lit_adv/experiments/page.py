"""What an experiment hands over: a table with its settings and notes, and a figure of curves."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_adv.archive import configuration
from lit_adv.protocol import Protocol


@dataclass(frozen=True)
class Page:
    """A table and what a reader must know of it.

    Args:
        title: of the page. settings: by name, all that the figures depend on.
        heads: of the columns; a paper's are labelled as the paper's. rows: cells as text, one per head.
        notes: below the table.

    Raises:
        ValueError: a row of another length than ``heads``.
    """

    title: str
    settings: Mapping[str, object]
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heads):
                raise ValueError(f"a row has {len(row)} cells for {len(self.heads)} columns: {list(row)}")

    def __str__(self) -> str:
        table = ["| " + " | ".join(row) + " |" for row in (self.heads, ["---"] * len(self.heads), *self.rows)]
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        notes = [f"* {note}" for note in self.notes]
        return "\n".join([f"# {self.title}", "", f"Settings: {settings}.", "", *table, "", *notes]).rstrip() + "\n"

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Write the page as Markdown and its table as CSV; returns the files."""
        folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        csv.writer(text).writerows([self.heads, *self.rows])
        files = {folder / f"{stem}.md": str(self), folder / f"{stem}.csv": text.getvalue()}
        for path, content in files.items():
            _put(path, content.encode())
        return list(files)


def told(protocol: Protocol) -> str:
    """An attack with all its arguments, for a note."""
    return f"{protocol.name}: {json.dumps(configuration(protocol.attack)['init_args'], sort_keys=True)}"


@dataclass(frozen=True)
class Curve:
    """A line of a figure.

    Attributes:
        name: in the legend. x, y: its points. low, high: ends of an interval about each, or empty.
        paper: it shows a paper's figures, and is dashed.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    paper: bool = False


def figure(path: Path, curves: Sequence[Curve], x: str, y: str, title: str = "", log: bool = False) -> Path:
    """Draw curves into a PNG file and return it.

    Args:
        path: its folder is made. x, y: names of the axes. log: whether the x axis is logarithmic.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    for curve in curves:
        (line,) = axes.plot(curve.x, curve.y, "--" if curve.paper else "o-", label=curve.name, markersize=4)
        if len(curve.low):
            axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel=x, ylabel=y, title=title)
    if log:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _drawn(path, drawn)


def histograms(path: Path, values: Mapping[str, Sequence[float]], x: str, title: str = "", bins: int = 60) -> Path:
    """Draw the distributions of named samples into a PNG file and return it.

    Args:
        path: its folder is made. values: samples by name in the legend. x: name of the axis. bins: common to all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    every = [value for sample in values.values() for value in sample]
    for name, sample in values.items():
        share = [1 / max(1, len(sample))] * len(sample)
        axes.hist(sample, bins=bins, range=(min(every), max(every)), weights=share, histtype="step", label=name)
    axes.set(xlabel=x, ylabel="share of images")
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _drawn(path, drawn)


def _drawn(path: Path, drawn: Any) -> Path:
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    _put(path, content.getvalue())
    return path


def _put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
