"""The plots of a report. Each draws on the matplotlib axes that it is given; `svg` and `png` make files of them."""

import contextlib
import functools
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fixmatch.report.figures import BINS, Calibration, thin
from fixmatch.report.record import Record

BLUE, ORANGE, GREEN, RED = "#3b82c4", "#e08a1e", "#2a9d6f", "#d1495b"  # told apart by the colour-blind, on both grounds
SIZE = (4.4, 3.1)  # inches of a plot: on a phone, too, its text is readable at the width of the page
_LABEL_WIDTH = 55  # characters of a line of a legend
_COLOURS = (BLUE, ORANGE, GREEN, RED, "#8e6bbf", "#7a8794")
_GROUND, _INK, _GRID = "#ffffff", "#1b1f24", "#d8dee4"
_IN_THE_DARK = {_GROUND: "#161b22", _INK: "#dfe6ee", _GRID: "#39424d"}
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Zen Hei", "SimHei")
_NAMED = 30  # classes; more are numbered, and not all of them

Draw = Callable[[Axes], None]


# --- files


def svg(draw: Draw, size: tuple[float, float] = SIZE) -> tuple[str, str]:
    """A plot as SVG for the light and for the dark; `size` in inches. It is drawn once, which takes time."""
    light = _render([draw], size, "svg").decode()
    return light, re.sub(f": ({'|'.join(_IN_THE_DARK)})", lambda found: f": {_IN_THE_DARK[found[1]]}", light)


def png(draws: Sequence[Draw], size: tuple[float, float] = SIZE) -> bytes:
    """Plots of `size` inches, two beside each other, as one PNG on white."""
    return _render(draws, size, "png")


def _render(draws: Sequence[Draw], size: tuple[float, float], file_type: str) -> bytes:
    blob = io.BytesIO()
    columns = min(2, len(draws))
    rows = -(-len(draws) // columns)
    with _style():
        figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
        FigureCanvasAgg(figure)
        for number, draw in enumerate(draws, 1):
            draw(figure.add_subplot(rows, columns, number))
        figure.savefig(blob, format=file_type, dpi=160, metadata={"Date": None} if file_type == "svg" else None)
    return blob.getvalue()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Class names may be in any script: an SVG leaves them to the browser's fonts, a PNG has those of this machine."""
    style = {
        "figure.facecolor": _GROUND, "axes.facecolor": _GROUND, "savefig.facecolor": _GROUND, "text.color": _INK,
        "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _GRID,
        "grid.color": _GRID, "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": matplotlib.cycler(color=_COLOURS),
        "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "font.size": 10,
        "font.family": _fonts(), "lines.linewidth": 1.8, "svg.fonttype": "none", "svg.hashsalt": "fixmatch",
        "text.parse_math": False}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@functools.cache
def _fonts() -> list[str]:
    """Those of _FONTS that this machine has: each of the others would be looked for at every text."""
    installed = set(font_manager.get_font_names())
    return [name for name in _FONTS if name in installed]


# --- curves over the steps

_OF_UNLABELED = ("loss_u", "mask", "pseudo_label_accuracy", "impurity")


def accuracy(run: Record, baseline: float | None = None) -> Draw:
    def draw(ax: Axes) -> None:
        steps = [line["step"] for line in run.evaluations]
        for which, label, options in (("ema", "EMA", {}), ("raw", "raw", {"alpha": 0.75, "linestyle": "--"})):
            values = [line[which]["top1"] for line in run.evaluations]
            ax.plot(*thin(steps, values), label=label, marker="o" if len(steps) < 30 else None, markersize=3.5,
                    **options)
        if baseline is not None:
            ax.axhline(baseline, color=RED, linestyle=":", label="supervised baseline")
        _label(ax, "Test accuracy", "top-1, %")
    return draw


def losses(run: Record) -> Draw:
    def draw(ax: Axes) -> None:
        names = ("loss",) if run.supervised else ("loss_x", "loss_u")
        for name in names:
            ax.plot(*_curve(run, name), label=f"training {name}")
        steps = [line["step"] for line in run.evaluations]
        ax.plot(*thin(steps, [line["ema"]["loss"] for line in run.evaluations]), label="EMA test loss",
                linestyle="--", color=GREEN)
        ax.set_yscale("symlog", linthresh=0.1)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylim(bottom=0)
        _label(ax, "Losses", "loss, 0 to 0.1 linear, then log")
    return draw


def pseudo_labels(run: Record) -> Draw:
    def draw(ax: Axes) -> None:
        for name, label, factor in (("mask", "confident (mask)", 100), ("pseudo_label_accuracy", "right, of all", 1),
                                    ("impurity", "wrong, of confident (impurity)", 1)):
            x, y = _curve(run, name)
            if len(x):
                ax.plot(x, factor * y, label=label)
        ax.set_ylim(-2, 102)
        _label(ax, "Pseudo-labels", "% of unlabeled images")
    return draw


def speed(run: Record) -> Draw:
    def draw(ax: Axes) -> None:
        x, y = _curve(run, "images_per_second")
        line = ax.plot(x, y, label="images/s")
        ax.set_ylim(0, 1.05 * float(y.max(initial=1)))
        wait = ax.twinx()
        x, y = _curve(run, "data_wait")
        line += wait.plot(x, 100 * y, color=ORANGE, label="waiting for data, %")
        wait.set_ylim(0, max(10.0, 110 * float(y.max(initial=0))))
        wait.set_ylabel("% of the time")
        wait.grid(visible=False)
        ax.yaxis.set_major_formatter("{x:,g}")
        _label(ax, "Speed", "images/s", line)
    return draw


def together(runs: Sequence[tuple[str, Record]], baselines: Sequence[float]) -> Draw:
    """EMA top-1 of several runs, (label, run), over what their networks were shown: a step of one may be five times the
    work of a step of another. Runs of one label have one colour.
    """
    def draw(ax: Axes) -> None:
        names = list(dict.fromkeys(label for label, _ in runs))
        for label, run in runs:
            turn, colour = divmod(names.index(label), len(_COLOURS))
            images = [run.config.images(0, line["step"]) / 1e6 for line in run.evaluations]
            label = textwrap.fill(label, _LABEL_WIDTH)
            shown = label in ax.get_legend_handles_labels()[1]
            ax.plot(*thin(images, [line["ema"]["top1"] for line in run.evaluations]), alpha=0.8,
                    color=_COLOURS[colour], linestyle=("-", "--", "-.", ":")[turn % 4],
                    marker="o" if len(images) < 30 else None, markersize=3.5, label=None if shown else label)
        for value in baselines:
            ax.axhline(value, color=RED, linestyle=":", linewidth=1)
        _label(ax, "EMA test accuracy", "top-1, %", x="million images trained on, each view counted")
        ax.xaxis.set_major_formatter("{x:g}")
    return draw


def size_of_together(labels: Sequence[str]) -> tuple[float, float]:
    """Inches of that plot, with room for its legend."""
    lines = sum(len(textwrap.wrap(label, _LABEL_WIDTH)) for label in labels)
    return SIZE[0], SIZE[1] + 0.17 * -(-lines // _columns(labels))


def _curve(run: Record, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; what is of unlabeled images begins where a supervised start has ended."""
    lines = [line for line in run.train
             if name not in _OF_UNLABELED or not run.config.ssl.supervised_at(line["step"] - line["steps"])]
    return thin([line["step"] for line in lines], [line.get(name) for line in lines])


def _label(ax: Axes, title: str, y: str, lines: Sequence[Artist] | None = None, x: str = "step") -> None:
    """Names the axes, the x axis in whole numbers, and puts the legend above them, where it hides no curve."""
    ax.set(xlabel=x, ylabel=y)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    _legend(ax, title, ax.get_legend_handles_labels()[0] if lines is None else lines)


def _legend(ax: Axes, title: str, lines: Sequence[Artist]) -> None:
    ax.legend(handles=lines, title=title, title_fontproperties={"weight": "bold", "size": 11}, alignment="left",
              loc="lower left", bbox_to_anchor=(0, 1), ncols=_columns([line.get_label() for line in lines]),
              fontsize=9, borderpad=0, frameon=False)


def _columns(labels: Sequence[str]) -> int:
    """Of a legend."""
    return max(1, _LABEL_WIDTH // (max(map(len, labels), default=0) + 6))


# --- of the last evaluation


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Draw:
    """Rows in percent of their class, so that rare classes show as frequent ones do; numbers are images."""
    def draw(ax: Axes) -> None:
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        shades = LinearSegmentedColormap.from_list("shares", [(BLUE, 0.0), (BLUE, 1.0)])
        ax.imshow(share, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
        ax.grid(visible=False)
        ax.set(title="Confusion", xlabel="predicted", ylabel="true")
        if len(classes) <= _NAMED:
            ax.tick_params(length=0)
            names = [shorten(name) for name in classes]
            ax.set_xticks(range(len(classes)), names, rotation=60 if max(map(len, names)) > 2 else 0, fontsize=9)
            ax.set_yticks(range(len(classes)), names, fontsize=9)
        if len(classes) <= 12:
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    ax.text(column, row, f"{count:,}", ha="center", va="center", fontsize=9)
    return draw


def size_of_confusion(classes: Sequence[str]) -> tuple[float, float]:
    """Inches of that plot, which of many classes is wider than a phone."""
    return (SIZE[0], 4.2) if len(classes) <= 10 else (6.4, 6)


def shorten(name: str, most: int = 18) -> str:
    """A class name as a plot can hold it: on one line, and cut."""
    name = "".join(c if c.isprintable() else "�" for c in name)
    return name if len(name) <= most else name[:most - 1] + "…"


def reliability(found: Calibration) -> Draw:
    def draw(ax: Axes) -> None:
        middle = (np.arange(BINS) + 0.5) / BINS
        seen = found.count > 0
        bars = ax.bar(middle[seen], 100 * found.accuracy[seen], width=0.9 / BINS, color=BLUE,
                      label="how many of a bar's images are right")
        shares = 100 * found.count / max(found.count.sum(), 1)
        dots = ax.plot(middle[seen], shares[seen], color=ORANGE, marker="o", markersize=4, linewidth=0,
                       label="how many of all images are in the bar")
        line = ax.plot([0, 1], [0, 100], color=RED, linestyle="--", label="as many right as the confidence says")
        ax.set(xlabel="confidence", ylabel="%", xlim=(0, 1), ylim=(0, 102))
        _legend(ax, f"Reliability, ECE {100 * found.ece:.1f} %", [bars, *dots, *line])
    return draw


def parity(stages: Sequence[dict], gate: float) -> Draw:
    """The worst relative error of each stage of the self-check, on a log scale."""
    def draw(ax: Axes) -> None:
        floor = 1e-18
        for row, stage in enumerate(stages):
            worst = max(float(stage["worst"]["rel"]), floor) if stage["worst"] else floor
            exact = stage["dtype"] == "float64"
            colour = RED if stage["verdict"] != "pass" else BLUE if exact else ORANGE
            ax.barh(row, min(worst, 10.0), left=floor, color=colour, height=0.7)
            if exact:
                ax.plot([gate, gate], [row - 0.45, row + 0.45], color=RED, linewidth=2)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(numticks=5))
        ax.xaxis.set_major_formatter("{x:.0e}")
        ax.set_yticks(range(len(stages)), [f"{s['stage']} {s['dtype']}".replace(" -", "") for s in stages], fontsize=9)
        ax.invert_yaxis()
        ax.set(title="Worst relative error by stage", xlabel="red line: the gate in float64", xlim=(floor, 10))
    return draw
