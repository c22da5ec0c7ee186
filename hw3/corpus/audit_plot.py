"""The plot of `hw3 data check`: lengths of texts and outputs, and directions, of several files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from hw3.common.figures import figure_settings, save_figure, shorten_name
from hw3.corpus.audit_report import DirectionCounts, FileAudit
from hw3.corpus.row_sides import row_sides
from hw3.data.rows import Row

# The palette of Okabe and Ito, distinguishable with any color vision. More files repeat its colors with other lines.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000"]
_LINES = ["-", "--", ":", "-."]
# Fill and text of each direction's bars.
_DIRECTIONS = {
    "m2c": ("modern to Classical (m2c)", "#332288", "white"),
    "c2m": ("Classical to modern (c2m)", "#88CCEE", "black"),
    "unknown": ("unknown", "#DDDDDD", "black"),
}
_DPI = 150
_BINS = 40
_NAME_COLUMNS = 30
_MIN_LABELED_SHARE = 0.08  # a narrower bar has no space for its label


def plot_files(files: Sequence[tuple[str, Sequence[Row], FileAudit]], path: Path) -> None:
    """Draw text lengths, output lengths and directions of files as shares of their rows.

    Args:
        files: name, rows and findings of each file.
        path: the image to write.
    """
    sides = [[row_sides(row) for row in rows] for _, rows, _ in files]
    with figure_settings():
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        text_axes, output_axes, direction_axes = figure.subplots(1, 3)
        _plot_lengths(text_axes, "texts to translate", [[len(side[0]) for side in own] for own in sides])
        _plot_lengths(output_axes, "outputs", [[len(side[1]) for side in own if len(side) > 1] for own in sides])
        text_axes.set_ylabel("share of the rows")
        _plot_directions(direction_axes, [(name, audit.directions, audit.rows) for name, _, audit in files])
        names = [shorten_name(name, _NAME_COLUMNS) for name, _, _ in files]
        lines = [Line2D([], [], label=name, linewidth=1.8, **_style(number)) for number, name in enumerate(names)]
        figure.legend(handles=lines, loc="outside lower left", ncols=min(4, len(lines)), fontsize=8, frameon=False)
    save_figure(figure, path, _DPI)


def _style(number: int) -> dict[str, Any]:
    """Return the color and the line of a file's outlines, by its number."""
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": _LINES[number // len(_COLORS) % len(_LINES)]}


def _plot_lengths(axes: Axes, title: str, lengths_by_file: Sequence[Sequence[int]]) -> None:
    longest = max((max(lengths) for lengths in lengths_by_file if lengths), default=1)
    edges = range(0, longest + 10, max(1, longest // _BINS))
    for number, lengths in enumerate(lengths_by_file):
        if lengths:
            weights = [1 / len(lengths)] * len(lengths)
            axes.hist(lengths, edges, weights=weights, histtype="step", linewidth=1.4, alpha=0.85, **_style(number))
    axes.set_xlabel("characters")
    axes.set_title(f"length of {title}", fontsize=10)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _plot_directions(axes: Axes, files: Sequence[tuple[str, DirectionCounts, int]]) -> None:
    for number, (_, directions, rows) in enumerate(files):
        start = 0.0
        for direction, (label, fill, text) in _DIRECTIONS.items():
            share = getattr(directions, direction) / rows
            axes.barh(number, share, left=start, color=fill, label=label if number == 0 else None)
            if share > _MIN_LABELED_SHARE:
                axes.text(start + share / 2, number, f"{share:.0%}", ha="center", va="center", fontsize=8, color=text)
            start += share
    axes.set_yticks(range(len(files)), [shorten_name(name, _NAME_COLUMNS) for name, _, _ in files], fontsize=8)
    for number, tick_label in enumerate(axes.get_yticklabels()):
        tick_label.set_color(_COLORS[number % len(_COLORS)])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("direction of the translation", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8, frameon=False)
