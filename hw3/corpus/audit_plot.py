"""The plot of `hw3 data check`: lengths of texts and outputs, and directions, of several files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hw3.corpus.audit_report import DirectionCounts, FileAudit
from hw3.corpus.row_sides import row_sides
from hw3.data.rows import Row

# The palette of Okabe and Ito, distinguishable with any color vision.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000"]
_BINS = 40
_MIN_LABELED_SHARE = 0.08  # a narrower bar has no space for its label


def plot_files(files: Sequence[tuple[str, Sequence[Row], FileAudit]], path: Path) -> None:
    """Draw text lengths, output lengths and directions of files as shares of their rows.

    Args:
        files: name, rows and findings of each file.
        path: the image to write.
    """
    figure, (text_axes, output_axes, direction_axes) = plt.subplots(
        1, 3, figsize=(12, 4), dpi=150, layout="constrained"
    )
    try:
        sides = [[row_sides(row) for row in rows] for _, rows, _ in files]
        _plot_lengths(text_axes, "texts to translate", [[len(side[0]) for side in own] for own in sides])
        _plot_lengths(output_axes, "outputs", [[len(side[1]) for side in own if len(side) > 1] for own in sides])
        text_axes.set_ylabel("share of the rows")
        _plot_directions(direction_axes, [(name, audit.directions, audit.rows) for name, _, audit in files])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
    finally:
        plt.close(figure)


def _plot_lengths(axes: Axes, title: str, lengths_by_file: Sequence[Sequence[int]]) -> None:
    longest = max((max(lengths) for lengths in lengths_by_file if lengths), default=1)
    edges = range(0, longest + 10, max(1, longest // _BINS))
    for number, lengths in enumerate(lengths_by_file):
        if lengths:
            weights = [1 / len(lengths)] * len(lengths)
            axes.hist(lengths, edges, weights=weights, histtype="step", color=_COLORS[number % len(_COLORS)])
    axes.set_xlabel("characters")
    axes.set_title(f"length of {title}", fontsize=10)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _plot_directions(axes: Axes, files: Sequence[tuple[str, DirectionCounts, int]]) -> None:
    for number, (_, directions, rows) in enumerate(files):
        start = 0.0
        parts = (("m2c", directions.m2c, 1.0), ("c2m", directions.c2m, 0.5), ("unknown", directions.unknown, 0.15))
        for label, count, alpha in parts:
            share = count / rows
            axes.barh(number, share, left=start, color=_COLORS[number % len(_COLORS)], alpha=alpha)
            if share > _MIN_LABELED_SHARE:
                axes.text(start + share / 2, number, label, ha="center", va="center", fontsize=8)
            start += share
    axes.set_yticks(range(len(files)), [name for name, _, _ in files], fontsize=8)
    for number, tick_label in enumerate(axes.get_yticklabels()):
        tick_label.set_color(_COLORS[number % len(_COLORS)])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("direction", fontsize=10)
