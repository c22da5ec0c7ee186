"""Draw `learning_curve.png`: mean perplexity by optimizer step, with the training loss and the base model's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hw3.evaluation.label_layout import spread_positions
from hw3.evaluation.results import EvalResults
from hw3.runs.results_file import ScoreEntry, finetuned_entries

# The palette of Okabe and Ito, which people with any color vision can distinguish.
SCORE_COLOR, LOSS_COLOR, BEST_COLOR, BASE_COLOR, DEV_COLOR = "#0072B2", "#999999", "#D55E00", "#009E73", "#CC79A7"
# Darker variants for small text on white.
BASE_TEXT_COLOR, BEST_TEXT_COLOR, LOSS_TEXT_COLOR = "#00694D", "#A34700", "#666666"
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5}
LABEL_OFFSET_POINTS = 3  # above the line that is labeled
LABEL_GAP_POINTS = 10  # between the baselines of two labels


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


def draw_learning_curve(results: EvalResults, losses: Sequence[tuple[int, float]]) -> Figure:
    """Draw the scores of the checkpoints as a line and those of the base model as horizontal lines.

    If a dev file selected the best checkpoint, the scores on it are drawn too.

    Args:
        results: scores of one data file.
        losses: (step, training loss) pairs.
    """
    entries = curve_entries(results)
    # Without pyplot, which would keep the figure open and look for a display.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    labels = [_draw_base_line(axes, entry) for entry in entries.base]
    if entries.finetuned:
        _draw_scores(axes, results, entries)
        _mark_best(axes, results, entries.finetuned)
    _style_axes(axes)
    handles, names = axes.get_legend_handles_labels()
    if losses:
        handles, names = [*handles, _draw_losses(axes, losses)], [*names, "training loss"]
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes.set_title(results.run_name, fontsize=10)
    _separate_labels(axes, labels, [entry.mean_perplexity for entry in entries.base])
    return figure


def save_learning_curve(results: EvalResults, losses: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw the learning curve and write it as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_learning_curve(results, losses).savefig(path, metadata={"Software": None})


def _draw_base_line(axes: Axes, entry: ScoreEntry) -> Annotation:
    name = "base" if entry.shots == 0 else f"base, {entry.shots} few-shot example{'s' if entry.shots > 1 else ''}"
    axes.axhline(entry.mean_perplexity, color=BASE_COLOR, linewidth=1, linestyle=":" if entry.shots else "--")
    return axes.annotate(
        f"{name}: {entry.mean_perplexity:#.4g}",
        (1, entry.mean_perplexity),
        xycoords=("axes fraction", "data"),
        xytext=(-4, LABEL_OFFSET_POINTS),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=BASE_TEXT_COLOR,
        bbox=LABEL_BOX,
    )


def _draw_scores(axes: Axes, results: EvalResults, entries: CurveEntries) -> None:
    low, high = zip(*(entry.mean_perplexity_ci95 for entry in entries.finetuned), strict=True)
    steps = [entry.step for entry in entries.finetuned]
    axes.fill_between(steps, low, high, color=SCORE_COLOR, alpha=0.15, linewidth=0)
    axes.plot(
        [entry.step for entry in entries.line],
        [entry.mean_perplexity for entry in entries.line],
        color=SCORE_COLOR,
        marker="o",
        markersize=3.5,
        label=f"mean perplexity on {results.data.path}, 95 % interval",
    )
    selector = results.selector
    if selector is not None and selector is not results:
        dev_line = curve_entries(selector).line
        axes.plot(
            [entry.step for entry in dev_line],
            [entry.mean_perplexity for entry in dev_line],
            color=DEV_COLOR,
            linestyle="--",
            marker="s",
            markersize=3,
            label=f"on {selector.data.path}, which selects the best",
        )


def _mark_best(axes: Axes, results: EvalResults, finetuned: Sequence[ScoreEntry]) -> None:
    best = results.best_entry()
    if best is None:  # the dev file's best checkpoint has not been scored on this file
        return
    axes.plot(best.step, best.mean_perplexity, marker="*", markersize=14, color=BEST_COLOR, linestyle="none")
    last_step = finetuned[-1].step
    axes.annotate(
        f"best: {best.mean_perplexity:#.4g} at step {best.step:,}",
        (best.step, best.mean_perplexity_ci95[0]),
        xytext=(0, -12),
        textcoords="offset points",
        ha=("left", "center", "right")[(best.step > 0.15 * last_step) + (best.step > 0.85 * last_step)],
        fontsize=9,
        color=BEST_TEXT_COLOR,
        bbox=LABEL_BOX,
    )


def _style_axes(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean perplexity of outputs (log scale)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", alpha=0.25)
    axes.margins(y=0.12)


def _draw_losses(axes: Axes, losses: Sequence[tuple[int, float]]) -> Line2D:
    loss_axes = axes.twinx()
    (line,) = loss_axes.plot(*zip(*losses, strict=True), color=LOSS_COLOR, linewidth=1, alpha=0.9)
    loss_axes.set_ylabel("training loss (nats per token)", color=LOSS_TEXT_COLOR)
    loss_axes.set_ylim(bottom=0)
    # The scores are drawn above the losses.
    axes.set_zorder(loss_axes.get_zorder() + 1)
    axes.patch.set_visible(False)
    return line


def _separate_labels(axes: Axes, labels: Sequence[Annotation], values: Sequence[float]) -> None:
    """Move the labels of close horizontal lines apart."""
    figure = axes.get_figure(root=True)
    assert figure is not None, "the axes are part of a figure"
    figure.draw_without_rendering()  # positions are known only after the layout
    points = [axes.transData.transform((0, value))[1] * 72 / figure.dpi for value in values]
    for label, point, position in zip(labels, points, spread_positions(points, LABEL_GAP_POINTS), strict=True):
        label.set_position((-4, LABEL_OFFSET_POINTS + position - point))
