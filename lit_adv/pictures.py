"""Pictures of an evaluation: clean and adversarial images side by side, and success curves."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lit_adv.metrics.records import Records
from lit_adv.metrics.summary import iterations_curve, queries_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; lighter ones of the same hue for dark ground.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DARK_COLOURS = ("#3FA0DC", "#F08040", "#2FBF95", "#DE9CC0", "#F0B740", "#9AD3F5")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_LEGIBLE = 64  # pixels; smaller images are enlarged


@dataclass(frozen=True, eq=False)
class Examples:
    """A few images to show.

    Args:
        index: Places in the data set.
        label: True classes.
        predicted: Classes given to the adversarial images.
        x0: Clean images in [0, 1].
        x_adv: Adversarial images in [0, 1].

    Shape:
        index, label, predicted (m,); x0, x_adv (m, C, H, W).

    Raises:
        ValueError: If the tensors differ in length or the images in shape.
    """

    index: Tensor
    label: Tensor
    predicted: Tensor
    x0: Tensor
    x_adv: Tensor

    def __post_init__(self) -> None:
        lengths = [len(column) for column in (self.index, self.label, self.predicted, self.x0, self.x_adv)]
        if len(set(lengths)) > 1 or self.x0.shape != self.x_adv.shape or self.x0.ndim != 4:
            shapes = f"x0 {tuple(self.x0.shape)}, x_adv {tuple(self.x_adv.shape)}"
            raise ValueError(f"examples need one length and one image shape, got lengths {lengths}, {shapes}")

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Panel:
    """One example as pictures (3, H, W) in [0, 1]; the difference times ``factor``, around grey."""

    index: int
    label: int
    predicted: int
    clean: Tensor
    adversarial: Tensor
    difference: Tensor
    factor: float


class Line(NamedTuple):
    """One line of the success curves; attack and model number its colour and its dashes."""

    label: str
    records: Records
    attack: int = 0
    model: int = 0


def panels(examples: Examples, rows: int = 8) -> list[Panel]:
    """Prepare the first examples for display.

    Args:
        examples: The images.
        rows: Most examples to prepare.
    """
    return [_panel(examples, i) for i in range(min(rows, len(examples)))]


def image_grid(examples: Examples, rows: int = 8) -> Tensor:
    """Lay out clean image, adversarial image and amplified difference, one example per row, for TensorBoard.

    Args:
        examples: The images; small ones are enlarged by whole factors without smoothing.
        rows: Most examples to show.

    Shape:
        Output: (3, H, W) in [0, 1].

    Raises:
        ValueError: If there is no example or no row to show.
    """
    from torchvision.utils import make_grid

    shown = panels(examples, rows)
    if not shown:
        raise ValueError(f"image_grid needs an example and a row, got {len(examples)} examples, rows = {rows}")
    images = torch.stack([image for panel in shown for image in (panel.clean, panel.adversarial, panel.difference)])
    factor = max(1, math.ceil(_LEGIBLE / max(images.shape[-2:])))
    enlarged = images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    return make_grid(enlarged, nrow=3, padding=2, pad_value=1.0)


def png(image: Tensor) -> bytes:
    """Encode an image (3, H, W) in [0, 1]."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def examples_png(examples: Examples, rows: int = 8) -> bytes:
    """Draw the examples with their labels, as a PNG file."""
    from matplotlib.figure import Figure

    shown = panels(examples, rows)
    figure = Figure(figsize=(5.4, 2.0 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for panel, line in zip(shown, axes, strict=True):
        clean, adversarial = f"image {panel.index}: {panel.label}", f"adversarial: {panel.predicted}"
        images = (panel.clean, panel.adversarial, panel.difference)
        titles = (clean, adversarial, f"difference \N{MULTIPLICATION SIGN} {panel.factor:.3g}")
        for ax, title, image in zip(line, titles, images, strict=True):
            ax.imshow(image.permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(title, fontsize=8)
            ax.set_axis_off()
    return _save(figure, 150)


def curves_png(lines: Sequence[Line], dark: bool = False) -> bytes:
    """Draw success against queries and against iterations, as a PNG file without ground.

    Args:
        lines: One per attack and model.
        dark: Whether the text must be legible on dark ground.
    """
    from matplotlib.figure import Figure

    ink, faint = ("#d5d8dc", "#4a4f57") if dark else ("#33373d", "#d5d8dc")
    colours = _DARK_COLOURS if dark else _COLOURS
    rows = math.ceil(len(lines) / 3)
    figure = Figure(figsize=(10, 3.3 + 0.2 * rows), layout="constrained")
    figure.patch.set_alpha(0 if dark else 1)
    left, right = figure.subplots(1, 2, sharey=True)
    _steps(left, lines, [queries_curve(line.records) for line in lines], colours)
    _steps(right, lines, [iterations_curve(line.records) for line in lines], colours)
    left.set_ylabel("success, share of attacked images", color=ink)
    for ax, label in ((left, "queries"), (right, "iterations")):
        ax.set_xlabel(label, color=ink)
        _style(ax, ink, faint)
    if lines:
        handles, labels = left.get_legend_handles_labels()
        columns = min(3, len(lines))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=ink)
    return _save(figure, 160)


def _panel(examples: Examples, i: int) -> Panel:
    clean, adversarial = _rgb(examples.x0[i]), _rgb(examples.x_adv[i])
    delta = adversarial - clean
    peak = float(delta.abs().max())
    factor = 0.5 / peak if peak else 1.0
    where = (int(examples.index[i]), int(examples.label[i]), int(examples.predicted[i]))
    return Panel(*where, clean, adversarial, (0.5 + factor * delta).clamp(0, 1), factor)


def _rgb(image: Tensor) -> Tensor:
    image = image.detach().to("cpu", torch.float32).clamp(0, 1)
    return image if len(image) == 3 else image.mean(dim=0, keepdim=True).expand(3, -1, -1)


def _steps(ax: Axes, lines: Sequence[Line], curves: Sequence[tuple[Tensor, Tensor]], colours: Sequence[str]) -> None:
    ends = [int(x[-1]) for x, _ in curves if len(x)]
    starts = [int(x[x > 0][0]) for x, _ in curves if (x > 0).any()]
    end = max([*ends, 1])
    for line, (x, y) in zip(lines, curves, strict=True):
        colour = colours[line.attack % len(colours)]
        dash = _DASHES[(line.model + line.attack // len(colours)) % len(_DASHES)]
        ax.plot([], [], color=colour, linestyle=dash, label=line.label)
        if len(x):
            ax.step(x.numpy(), y.numpy(), where="post", color=colour, linestyle=dash, linewidth=1.8)
            # Faint beyond the attack's own end: it asked no more, so its success stays what it was.
            ax.plot([int(x[-1]), end], [float(y[-1])] * 2, color=colour, linewidth=0.8, alpha=0.5)
    if starts and end > 50 * min(starts):
        ax.set_xscale("log")
        ax.set_xlim(min(starts), end)
    else:
        ax.set_xlim(0, end)


def _style(ax: Axes, ink: str, faint: str) -> None:
    ax.patch.set_alpha(0)
    ax.set_ylim(-0.02, 1.02)
    ax.grid(True, color=faint, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=ink, length=0, labelsize=9)
    for name, spine in ax.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(ink)


def _save(figure: Figure, dpi: int) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()
