"""Draw a search: the scores of all trials while they trained, the keys' importances, and parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from hw3.common.figures import figure_settings, save_figure, shorten_name
from hw3.evaluation.learning_curve import COLORS, STYLE, WIDTH, log_ticks
from hw3.report.search_trials import format_setting, format_settings, rank_trials, short_names
from hw3.runs.search_record import SearchRecord, TrialRecord

# In points.
_HEIGHT = 620
_CHARACTER_WIDTH = 7
_PNG_DPI = 114  # 1,200 pixels wide
_MAX_TICKS = 8  # values of a key that are written beside its axis


def draw_search_figure(record: SearchRecord, width: int = WIDTH) -> Figure:
    """Draw a search. The `gid` of a line is its tooltip.

    Args:
        record: the search; at least one trial has a score.
        width: width in points.
    """
    with figure_settings(STYLE):
        figure = Figure(figsize=(width / 72, _HEIGHT / 72), dpi=72, layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[2, 1])
        _draw_curves(figure.add_subplot(grid[0, 0]), record)
        _draw_importances(figure.add_subplot(grid[0, 1]), record)
        _draw_coordinates(figure.add_subplot(grid[1, :]), record)
        title = f"{record.recipe}: {len(record.trials)} of {record.total_trials} trials"
        figure.suptitle(shorten_name(title, width // _CHARACTER_WIDTH))
    return figure


def save_search_figure(record: SearchRecord, path: Path) -> None:
    """Draw a search and write the picture as a PNG file."""
    save_figure(draw_search_figure(record), path, _PNG_DPI)


def _scored(record: SearchRecord) -> list[TrialRecord]:
    """Return the trials that have a score, the best one last, so that it is drawn above the others."""
    return [trial for trial in reversed(rank_trials(record)) if trial.score is not None]


def _line_style(trial: TrialRecord, is_best: bool) -> dict[str, Any]:
    if is_best:
        return {"color": COLORS["best"], "linewidth": 2.5, "zorder": 3}
    is_complete = trial.outcome == "complete"
    return {"color": COLORS["score" if is_complete else "loss"], "linewidth": 1.2, "alpha": 0.8 if is_complete else 0.5}


def _draw_curves(axes: Axes, record: SearchRecord) -> None:
    axes.set_title(f"{record.best_by.replace('_', ' ')}, log scale")
    trials = _scored(record)
    for trial in trials:
        style = _line_style(trial, trial is trials[-1])
        tooltip = f"trial {trial.number}, {trial.outcome}: {trial.score:.3f}; {format_settings(trial.settings)}"
        axes.plot(list(trial.scores), list(trial.scores.values()), marker="o", markersize=3, gid=tooltip, **style)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_yticks(log_ticks(*axes.get_ylim()))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("optimizer step", loc="right")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    handles = {
        "best": ("complete", True),
        "trained to the end": ("complete", False),
        "stopped by the pruner": ("pruned", False),
    }
    for label, (outcome, is_best) in handles.items():
        sample = trials[-1].model_copy(update={"outcome": outcome})
        axes.plot([], [], label=label, **_line_style(sample, is_best))
    axes.legend(fontsize="small")


def _draw_importances(axes: Axes, record: SearchRecord) -> None:
    axes.set_title(f"importance at step {record.importances_step}" if record.importances else "importance")
    importances = dict(sorted(record.importances.items(), key=lambda pair: pair[1]))
    if not importances:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "too few trials\nto tell", ha="center", va="center", color=COLORS["soft"])
        return
    names = short_names(list(importances))
    axes.barh([names[key] for key in importances], list(importances.values()), color=COLORS["score"], height=0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(3))


def _draw_coordinates(axes: Axes, record: SearchRecord) -> None:
    """Draw each trial as a line through its values, one vertical axis for each key and one for the score."""
    trials = _scored(record)
    keys = list(trials[-1].settings)
    columns = [[trial.settings.get(key) for trial in trials] for key in keys]
    scores: list[Any] = [trial.score for trial in trials]
    positions = [_positions(column) for column in [*columns, scores]]
    names = [*short_names(keys).values(), record.best_by.replace("_", " ")]
    for number, trial in enumerate(trials):
        heights = [column[number] for column in positions]
        style = _line_style(trial, trial is trials[-1])
        axes.plot(range(len(heights)), heights, gid=format_settings(trial.settings), **style)
    for at, (column, heights) in enumerate(zip([*columns, scores], positions, strict=True)):
        axes.axvline(at, color=COLORS["rule"], zorder=0)
        _write_values(axes, at, column, heights)
    axes.set_xticks(range(len(names)), [shorten_name(name, 22) for name in names])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(names) - 0.6)
    axes.set_title("settings of each trial")


def _positions(values: Sequence[Any]) -> list[float]:
    """Return heights from 0 to 1: of numbers by rank of their size, of other values in the order of their texts."""
    distinct = _distinct(values)
    step = 1 / max(1, len(distinct) - 1)
    return [distinct.index(value) * step for value in values]


def _distinct(values: Sequence[Any]) -> list[Any]:
    distinct = [value for number, value in enumerate(values) if value not in values[:number]]
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct)
    return sorted(distinct, key=(lambda value: value) if is_numeric else format_setting)


def _write_values(axes: Axes, at: int, values: Sequence[Any], heights: Sequence[float]) -> None:
    """Write the values of one axis beside it: all of them if they are few, else the ends and some between."""
    distinct = dict(sorted(zip(heights, values, strict=True), key=lambda pair: pair[0]))
    every = -(-len(distinct) // _MAX_TICKS)
    for number, (height, value) in enumerate(distinct.items()):
        if number % every == 0 or number == len(distinct) - 1:
            text = shorten_name(format_setting(value), 18)
            box = {"facecolor": COLORS["page"], "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
            axes.text(at + 0.03, height, text, va="center", color=COLORS["soft"], fontsize="small", bbox=box, zorder=4)
