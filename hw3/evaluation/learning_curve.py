"""Draw the learning curve: mean perplexity by optimizer step, and the training loss below.

`learning_curve.png` and the report show the same drawing. The report's is in the language of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from hw3.common.figures import figure_settings, save_figure, shorten_name
from hw3.common.text import count_columns
from hw3.evaluation.label_layout import spread_positions
from hw3.evaluation.results import EvalResults
from hw3.runs.results_file import ScoreEntry, finetuned_entries

# The variables of `report/page.css` with their values in its light theme. `report/svg.py` replaces values by variables.
# Okabe and Ito's palette, darker for text: people with any color vision can distinguish them.
COLORS = {
    "page": "#fcfcfa", "ink": "#1c1e21", "soft": "#5b6067", "rule": "#e1e1db",
    "score": "#0072b2", "best": "#b34c00", "base": "#00734f", "dev": "#a8487f", "loss": "#6d7278",
}  # fmt: skip
# All in points. In the report, a point is a pixel.
WIDTH = 760
_SCORES_HEIGHT, _LOSSES_HEIGHT, _MARGIN_HEIGHT = 270, 100, 100
_FONT_SIZE = 12
_CHARACTER_WIDTH = 7
_LABEL_GAP = 14
_PNG_DPI = 114  # 1,200 pixels wide
# Multiples of powers of ten that can be ticks; the first that give enough ticks are used.
_LOG_TICK_MULTIPLES = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8))
_MIN_LOG_TICKS = 4
STYLE = {
    "axes.edgecolor": COLORS["soft"], "axes.titlecolor": COLORS["soft"], "axes.titlelocation": "left",
    "axes.titlesize": _FONT_SIZE, "axes.facecolor": COLORS["page"], "axes.spines.left": False,
    "axes.spines.right": False, "axes.spines.top": False, "axes.labelcolor": COLORS["soft"],
    "figure.facecolor": COLORS["page"], "figure.titlesize": _FONT_SIZE, "font.size": _FONT_SIZE,
    "grid.color": COLORS["rule"], "legend.frameon": False, "text.color": COLORS["ink"],
    "xtick.labelcolor": COLORS["soft"], "ytick.labelcolor": COLORS["soft"], "xtick.major.size": 0,
    "ytick.major.size": 0,
}  # fmt: skip


@dataclass(frozen=True)
class CurveEntries:
    """The entries under the run's own prompt.

    Attributes:
        base: of the base model, by number of few-shot examples.
        finetuned: zero-shot entries of the run's checkpoints, by step.
    """

    base: list[ScoreEntry]
    finetuned: list[ScoreEntry]

    @property
    def line(self) -> list[ScoreEntry]:
        """The zero-shot entries from step 0 on."""
        return [*(entry for entry in self.base if entry.shots == 0), *self.finetuned]


def curve_entries(results: EvalResults) -> CurveEntries:
    """Return the entries that the learning curve shows."""
    base = [entry for entry in results.entries if entry.is_base and entry.prompt.sha256 == results.prompt_sha256]
    return CurveEntries(
        sorted(base, key=lambda entry: entry.shots), finetuned_entries(results.entries, results.prompt_sha256)
    )


Translate = Callable[..., str]  # from an English text and the values of its fields to the text of a picture


def draw_learning_curve(
    results: EvalResults, losses: Sequence[tuple[int, float]], width: int = WIDTH, tr: Translate = str.format
) -> Figure:
    """Draw the scores of checkpoints as a line, those of the base model as levels, and the training loss below.

    All scores have their intervals. If a dev file selects the best checkpoint, the scores on it are drawn too. The
    `gid` of a point or level is its tooltip.

    Args:
        results: scores of one data file.
        losses: (step, training loss) pairs.
        width: width in points. The size of texts does not depend on it, so a narrow screen needs a narrow drawing.
        tr: translates the texts; English without it.
    """
    entries = curve_entries(results)
    height = _SCORES_HEIGHT + _MARGIN_HEIGHT + (_LOSSES_HEIGHT if losses else 0)
    with figure_settings(STYLE):
        # Without pyplot, which would keep the figure open and look for a display.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        legend_columns = max(1, width // 350)
        panels = figure.subplots(1 + bool(losses), sharex=True, height_ratios=[3, 1] if losses else [1], squeeze=False)
        axes, last_axes = panels[0, 0], panels[-1, 0]
        labels = [_draw_level(axes, entry, tr) for entry in entries.base]
        _draw_scores(axes, results, entries, width // legend_columns // _CHARACTER_WIDTH, tr)
        _mark_best(axes, results, entries.line, tr)
        _style_score_axis(axes)
        axes.set_title(tr("mean perplexity, log scale"))
        if losses:
            _draw_losses(last_axes, losses)
            last_axes.set_title(tr("training loss, nats per token"))
        last_step = max([entry.step for entry in entries.line] + [step for step, _ in losses] + [1])
        axes.set_xlim(-0.015 * last_step, 1.015 * last_step)
        last_axes.xaxis.set_major_locator(MaxNLocator(max(3, width // 90), integer=True))
        last_axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        last_axes.set_xlabel(tr("optimizer step"), loc="right")
        figure.suptitle(shorten_name(results.run_name, width // _CHARACTER_WIDTH))
        figure.legend(loc="outside lower left", ncols=legend_columns)
        _separate_labels(axes, labels, [entry.mean_perplexity for entry in entries.base])
    return figure


def save_learning_curve(results: EvalResults, losses: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw the learning curve and write it as a PNG file."""
    save_figure(draw_learning_curve(results, losses), path, _PNG_DPI)


def _describe_score(entry: ScoreEntry) -> str:
    low, high = entry.mean_perplexity_ci95
    return f"{entry.mean_perplexity:.3f} [{low:.2f}, {high:.2f}]"


def _format_score(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _draw_level(axes: Axes, entry: ScoreEntry, tr: Translate) -> Annotation:
    """Draw a score of the base model as a horizontal line with its interval; return its label."""
    name = tr("{shots}-shot", shots=entry.shots) if entry.shots else tr("base")
    tooltip = f"{name}{tr(': ')}{_describe_score(entry)}"
    axes.axhspan(*entry.mean_perplexity_ci95, color=COLORS["base"], alpha=0.1, linewidth=0, gid=tooltip)
    axes.axhline(
        entry.mean_perplexity, color=COLORS["base"], linewidth=1.2, linestyle=":" if entry.shots else "--", gid=tooltip
    )
    return axes.annotate(
        f"{name} {_format_score(entry.mean_perplexity)}",
        (1, entry.mean_perplexity),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=COLORS["base"],
    )


def _draw_scores(axes: Axes, results: EvalResults, entries: CurveEntries, columns: int, tr: Translate) -> None:
    """Draw the scores on the data file, and those on the dev file if another file selects the best checkpoint."""
    if entries.finetuned:
        steps = [entry.step for entry in entries.finetuned]
        low, high = zip(*(entry.mean_perplexity_ci95 for entry in entries.finetuned), strict=True)
        axes.fill_between(steps, low, high, color=COLORS["score"], alpha=0.16, linewidth=0)
        axes.vlines(steps, low, high, color=COLORS["score"], alpha=0.3)
    label = _shorten_label(results.data.path, tr(", 95 % interval"), columns)
    _draw_line(axes, entries.line, label, "score", tr)
    selector = results.selector
    if selector is not None and selector is not results:
        label = _shorten_label(selector.data.path, tr(", selects the best"), columns)
        _draw_line(axes, curve_entries(selector).line, label, "dev", tr)


def _shorten_label(file: str, role: str, columns: int) -> str:
    """Return the label of a line: the end of the file's name that fits, and what the file is for."""
    return shorten_name(file, columns - count_columns(role) - 8) + role


def _draw_line(axes: Axes, entries: Sequence[ScoreEntry], label: str, color: str, tr: Translate) -> None:
    is_dev = color == "dev"
    style: dict[str, Any] = {"color": COLORS[color], "marker": "s" if is_dev else "o", "markersize": 4 if is_dev else 6}
    axes.plot(
        [entry.step for entry in entries],
        [entry.mean_perplexity for entry in entries],
        linewidth=1.5,
        linestyle="--" if is_dev else "-",
        label=label,
        **style,
    )
    for entry in entries:
        tooltip = f"{tr('dev, ') if is_dev else ''}{_describe_step(entry, tr)}"
        axes.plot(entry.step, entry.mean_perplexity, gid=tooltip, clip_on=False, **style)


def _describe_step(entry: ScoreEntry, tr: Translate) -> str:
    return f"{tr('step {step:,}', step=entry.step)}{tr(': ')}{_describe_score(entry)}"


def _mark_best(axes: Axes, results: EvalResults, line: Sequence[ScoreEntry], tr: Translate) -> None:
    best = results.best_entry()
    if best is None:  # the dev file's best checkpoint has not been scored on this file
        return
    axes.plot(
        best.step,
        best.mean_perplexity,
        marker="*",
        markersize=15,
        color=COLORS["best"],
        markeredgecolor=COLORS["page"],
        gid=f"{tr('best')}{tr(': ')}{_describe_step(best, tr)}",
        clip_on=False,
    )
    last_step = line[-1].step
    axes.annotate(
        tr("best {score}, step {step:,}", score=_format_score(best.mean_perplexity), step=best.step),
        (best.step, best.mean_perplexity_ci95[0]),
        xytext=(0, -4),
        textcoords="offset points",
        va="top",
        ha=("left", "center", "right")[(best.step > 0.2 * last_step) + (best.step > 0.8 * last_step)],
        color=COLORS["best"],
        bbox={"facecolor": COLORS["page"], "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
    )


def _style_score_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_yticks(log_ticks(*axes.get_ylim()))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def log_ticks(low: float, high: float) -> list[float]:
    """Return round values between two bounds."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for multiples in _LOG_TICK_MULTIPLES:
        ticks = [multiple * power for power in powers for multiple in multiples if low <= multiple * power <= high]
        if len(ticks) >= _MIN_LOG_TICKS:
            return ticks
    return [value for value in MaxNLocator(nbins=5).tick_values(low, high) if low <= value <= high]


def _draw_losses(axes: Axes, losses: Sequence[tuple[int, float]]) -> None:
    axes.plot(*zip(*losses, strict=True), color=COLORS["loss"], linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _separate_labels(axes: Axes, labels: Sequence[Annotation], values: Sequence[float]) -> None:
    """Move the labels of close horizontal lines apart."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes are part of a figure"
    figure.draw_without_rendering()  # positions are known only after the layout
    points = [axes.transData.transform((0, value))[1] for value in values]
    for label, point, position in zip(labels, points, spread_positions(points, _LABEL_GAP), strict=True):
        label.set_position((6, position - point))
