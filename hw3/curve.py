"""The learning curve: score by step beside the training loss, best step and step 0 marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hw3.results import Results
from hw3.run_folder import complete_checkpoints

# Okabe and Ito's palette, told apart with any colour vision.
SCORE, LOSS, BEST, SHOTS = "#0072B2", "#999999", "#D55E00", "#009E73"


def training_losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) as logged, from the last complete checkpoint's trainer state."""
    checkpoints = complete_checkpoints(run)
    if not checkpoints:
        return []
    state = json.loads((checkpoints[-1].path / "trainer_state.json").read_text(encoding="utf-8"))
    return [(log["step"], log["loss"]) for log in state["log_history"] if "loss" in log]


def draw_curve(results: Results, run: Path, picture: Path) -> None:
    """Draw `learning_curve.png`: tuned entries under the recipe's prompt, base entries as level lines."""
    own = [entry for entry in results.entries if entry["prompt"]["sha256"] == results.recipe_prompt]
    tuned = [entry for entry in own if entry["checkpoint"] is not None and entry["shots"] == 0]
    base = [entry for entry in own if entry["checkpoint"] is None]
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
    for entry in base:
        step0 = entry["shots"] == 0
        label = "base" if step0 else f"base, {entry['shots']} worked example{'s' if entry['shots'] > 1 else ''}"
        axes.axhline(entry["mean_perplexity"], color=SHOTS, linewidth=1, linestyle="--" if step0 else ":")
        axes.annotate(
            f"{label}: {entry['mean_perplexity']:.4g}",
            (1, entry["mean_perplexity"]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=SHOTS,
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
        best = results.best()
        assert best is not None  # there are tuned entries
        axes.plot(best["step"], best["mean_perplexity"], marker="*", markersize=14, color=BEST, linestyle="none")
        axes.annotate(
            f"best: {best['mean_perplexity']:.4g} at step {best['step']:,}",
            (best["step"], best["mean_perplexity"]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=BEST,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean perplexity of outputs (log scale)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", alpha=0.25)
    axes.margins(y=0.12)
    handles, labels = axes.get_legend_handles_labels()
    if losses:
        other = axes.twinx()
        (line,) = other.plot(*zip(*losses, strict=True), color=LOSS, linewidth=1, alpha=0.9, label="training loss")
        other.set_ylabel("training loss (nats a token)", color="#666666")
        other.set_ylim(bottom=0)
        handles, labels = [*handles, line], [*labels, "training loss"]
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
    if handles:
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axes.set_title(results.head["run"], fontsize=10)
