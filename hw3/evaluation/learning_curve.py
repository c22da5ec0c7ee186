"""The learning curve: score by step beside the training loss, best step and step 0 marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hw3.evaluation.results import Results
from hw3.runs.checkpoints import complete_checkpoints

matplotlib.use("Agg")

# Okabe and Ito's palette, told apart with any colour vision.
SCORE, LOSS, BEST, SHOTS, DEV = "#0072B2", "#999999", "#D55E00", "#009E73", "#CC79A7"
SHOTS_TEXT, BEST_TEXT = "#00694D", "#A34700"  # darker, for small letters on white
PATCH = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5}
LABEL_GAP = 10  # points between the base lines of two labels


def training_losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) as logged, from the last complete checkpoint's trainer state."""
    checkpoints = complete_checkpoints(run)
    if not checkpoints:
        return []
    state = json.loads((checkpoints[-1].path / "trainer_state.json").read_text(encoding="utf-8"))
    return [(log["step"], log["loss"]) for log in state["log_history"] if "loss" in log]


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved as little as can be, in the sum of squares, until neighbours are `gap` apart.

    Isotonic regression by pooling adjacent violators (Ayer et al., 1955), on positions less their rank times `gap`.

    Args:
        positions: where labels would stand, in any order.
        gap: least distance between two of them, in the same unit.

    Returns:
        New positions, in the order given.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([positions[index] - rank * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    levels = [_mean(pool) for pool in pools for _ in pool]
    placed = {index: level + rank * gap for rank, (index, level) in enumerate(zip(order, levels, strict=True))}
    return [placed[index] for index in range(len(positions))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def own_entries(results: Results) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The base's entries under the recipe's prompt, by worked examples, and the run's tuned zero-shot ones, by step."""
    own = [entry for entry in results.entries if entry["prompt"]["sha256"] == results.recipe_prompt]
    base = [entry for entry in own if entry["checkpoint"] is None]
    tuned = [entry for entry in own if (entry["checkpoint"] or "").startswith("checkpoint-") and entry["shots"] == 0]
    return sorted(base, key=lambda entry: entry["shots"]), sorted(tuned, key=lambda entry: entry["step"])


def draw_curve(results: Results, run: Path, picture: Path) -> None:
    """Draw `learning_curve.png`: tuned entries under the recipe's prompt, base entries as level lines.

    Where a dev file has chosen the best step, its scores are drawn as well.
    """
    base, tuned = own_entries(results)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    try:
        _draw(axes, results, tuned, base, training_losses(run))
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, metadata={"Software": None})
    finally:
        plt.close(figure)


def _draw(
    axes: plt.Axes,
    results: Results,
    tuned: list[dict[str, Any]],
    base: list[dict[str, Any]],
    losses: list[tuple[int, float]],
) -> None:
    axes.set_yscale("log")
    labels = []
    for entry in base:
        step0 = entry["shots"] == 0
        label = "base" if step0 else f"base, {entry['shots']} worked example{'s' if entry['shots'] > 1 else ''}"
        axes.axhline(entry["mean_perplexity"], color=SHOTS, linewidth=1, linestyle="--" if step0 else ":")
        labels.append(
            axes.annotate(
                f"{label}: {entry['mean_perplexity']:#.4g}",
                (1, entry["mean_perplexity"]),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=SHOTS_TEXT,
                bbox=PATCH,
            )
        )
    if tuned:
        steps = [entry["step"] for entry in tuned]
        low, high = zip(*(entry["mean_perplexity_ci95"] for entry in tuned), strict=True)
        axes.fill_between(steps, low, high, color=SCORE, alpha=0.15, linewidth=0)
        zero = [entry for entry in base if entry["shots"] == 0]
        line = [*zero, *tuned]
        axes.plot(
            [entry["step"] for entry in line],
            [entry["mean_perplexity"] for entry in line],
            color=SCORE,
            marker="o",
            markersize=3.5,
            label=f"mean perplexity on {results.head['data']['path']}, 95 % interval",
        )
        chooser = results.chosen_on
        if chooser is not None and chooser is not results:
            dev_base, dev_tuned = own_entries(chooser)
            line = [*(entry for entry in dev_base if entry["shots"] == 0), *dev_tuned]
            axes.plot(
                [entry["step"] for entry in line],
                [entry["mean_perplexity"] for entry in line],
                color=DEV,
                linestyle="--",
                marker="s",
                markersize=3,
                label=f"on {chooser.head['data']['path']}, which chooses",
            )
        best = results.best()
        assert best is not None  # there are tuned entries
        axes.plot(best["step"], best["mean_perplexity"], marker="*", markersize=14, color=BEST, linestyle="none")
        axes.annotate(
            f"best: {best['mean_perplexity']:#.4g} at step {best['step']:,}",
            (best["step"], low[steps.index(best["step"])]),
            xytext=(0, -12),
            textcoords="offset points",
            ha=("left", "center", "right")[(best["step"] > 0.15 * steps[-1]) + (best["step"] > 0.85 * steps[-1])],
            fontsize=9,
            color=BEST_TEXT,
            bbox=PATCH,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean perplexity of outputs (log scale)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", alpha=0.25)
    axes.margins(y=0.12)
    handles, names = axes.get_legend_handles_labels()
    if losses:
        other = axes.twinx()
        (line,) = other.plot(*zip(*losses, strict=True), color=LOSS, linewidth=1, alpha=0.9, label="training loss")
        other.set_ylabel("training loss (nats a token)", color="#666666")
        other.set_ylim(bottom=0)
        handles, names = [*handles, line], [*names, "training loss"]
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
    if handles:
        axes.figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axes.set_title(results.head["run"], fontsize=10)
    # Once everything has its size: labels of lines that lie close are moved apart.
    axes.figure.draw_without_rendering()
    points = [axes.transData.transform((0, entry["mean_perplexity"]))[1] * 72 / axes.figure.dpi for entry in base]
    for label, point, place in zip(labels, points, spread(points, LABEL_GAP), strict=True):
        label.set_position((-4, 3 + place - point))
