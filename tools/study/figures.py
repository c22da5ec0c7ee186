"""The pictures of docs/study.md, one for each question."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from hw3.common.figures import figure_settings
from hw3.evaluation.learning_curve import COLORS, log_ticks
from study.analysis import CRITERIA, SETTINGS_KEYS, Case, Record, Study, mean_curve
from study.plan import StudyModel

WIDTH, HEIGHT = 10.0, 3.6  # inches
DPI = 120
MODEL_TITLES = {"tiny": "embedded model, {rows} rows", "smollm2": "SmolLM2-135M, {rows} rows of public_test.json"}
# Okabe and Ito's palette, which people with any color vision can distinguish.
PALETTE = (COLORS["score"], COLORS["best"], COLORS["base"], COLORS["dev"], COLORS["loss"])
_STYLE = {
    "axes.facecolor": COLORS["page"], "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titlesize": 10, "axes.labelcolor": COLORS["soft"],
    "axes.edgecolor": COLORS["soft"], "figure.facecolor": COLORS["page"], "font.size": 9, "grid.color": COLORS["rule"],
    "legend.frameon": False, "text.color": COLORS["ink"], "xtick.labelcolor": COLORS["soft"],
    "ytick.labelcolor": COLORS["soft"],
}  # fmt: skip


def draw_all(study: Study) -> dict[str, Figure]:
    """Return the picture of every experiment that has finished runs, by the name of its file."""
    drawings: dict[str, tuple[Callable[[Axes, Study, str], None], str]] = {
        "few_shot": (_draw_few_shot, "few-shot examples"),
        "prompts": (_draw_prompts, "mean perplexity"),
        "schedule": (_draw_schedules, "optimizer step"),
        "rows_per_step": (partial(_draw_differences, "rows_per_step"), "rows per step"),
        "data": (partial(_draw_differences, "data"), "training rows"),
        "precision": (partial(_draw_differences, "precision"), ""),
        "prompt": (_draw_prompt_matrix, "prompt in scoring"),
    }
    with figure_settings(_STYLE):
        figures = {
            "curves": _per_model(study, study.models, _draw_curves, "optimizer step"),
            "settings": _draw_settings(study),
            "selection": _per_model(
                study, study.models, _draw_selection, "criterion, and runs in which it selects another checkpoint"
            ),
            "transfer": _per_model(study, study.models, _draw_transfer, "mean perplexity on the evaluation file"),
        }
        for name, (draw, xlabel) in drawings.items():
            models = [model for model in study.models if _has_scores(study, model.name, name)]
            if models:
                figures[name] = _per_model(study, models, draw, xlabel)
    return figures


def _has_scores(study: Study, model: str, name: str) -> bool:
    """Return whether a model's finished runs have what a picture shows."""
    if name in ("few_shot", "prompts"):
        field = "shots" if name == "few_shot" else "prompt"
        return any(field in entry for entry in study.entries(model, "base"))
    return bool(study.select(model, name))


def _per_model(
    study: Study, models: Sequence[StudyModel], draw: Callable[[Axes, Study, str], None], xlabel: str = ""
) -> Figure:
    """Draw a panel for each model."""
    figure = Figure(figsize=(WIDTH * (1 + len(models)) / 3, HEIGHT), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        draw(axes, study, model.name)
        rows = study.perplexities(study.select(model.name)[:1]).shape[1]
        axes.set_title(MODEL_TITLES[model.name].format(rows=rows))
        axes.set_xlabel(xlabel)
        if not axes.images:
            axes.grid(axis="y")
        axes.set_axisbelow(True)
    return figure


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_yticks(log_ticks(*axes.get_ylim()))


def _draw_lines(axes: Axes, named: Sequence[tuple[str, Sequence[Record]]]) -> None:
    """Draw the mean learning curve of each group of runs, with the range of its seeds."""
    for (name, runs), color in zip(named, PALETTE, strict=False):
        steps, means, low, high = zip(*mean_curve(runs), strict=True)
        axes.plot(steps, means, color=color, marker="o", markersize=3, label=name)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set_ylabel("mean perplexity")
    _log_scale(axes)
    axes.legend(fontsize=8)


def _draw_curves(axes: Axes, study: Study, model: str) -> None:
    best = study.best_case(model, "settings", *SETTINGS_KEYS)
    named = [("settings of the published study", study.select(model, "study"))]
    named.append(("recipe", study.select(model, "recipe")))
    named.append((f"best of the grid: {name_setting(best)}", study.cases(model, "settings", *SETTINGS_KEYS)[best]))
    _draw_lines(axes, [(name, runs) for name, runs in named if runs])


def name_setting(case: tuple[Any, ...]) -> str:
    """Return a setting of the grid as text."""
    rate, rank, alpha_over_r = case
    return f"{rate:g}, r {rank}, alpha/r {alpha_over_r:g}"


def _draw_few_shot(axes: Axes, study: Study, model: str) -> None:
    scores: dict[str, FewShotScores] = {"base": {}, "best": {}}
    for name, by_source in scores.items():
        for entry in study.entries(model, name):
            if "shots" in entry:
                by_source.setdefault(entry["examples"], []).append((entry["shots"], entry["mean_perplexity"]))
    _draw_few_shot_scores(axes, scores["base"], scores["best"])


# (Number of examples, mean perplexity) by source of the examples: `prompt`, or `train` if they were drawn.
FewShotScores = dict[str, list[tuple[int, float]]]


def _draw_few_shot_scores(axes: Axes, base: FewShotScores, best: FewShotScores) -> None:
    """Draw scores by the number of few-shot examples, of the base model and fine-tuned."""
    for scores, color, label in ((base, COLORS["base"], "base model"), (best, COLORS["best"], "fine-tuned")):
        for source, marker, line in (("prompt", "o", "-"), ("train", "s", "")):
            if points := sorted(scores.get(source, [])):
                text = f"{label}, the prompt's examples" if source == "prompt" else f"{label}, drawn examples"
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=text)
    axes.set_xticks([0, 1, 2, 4, 8])
    axes.set_xlabel("few-shot examples")
    axes.set_ylabel("mean perplexity")
    _log_scale(axes)
    axes.legend(fontsize=7)


def _draw_prompts(axes: Axes, study: Study, model: str) -> None:
    base, best = (
        {
            entry["prompt"]: (entry["mean_perplexity"], entry["ci95"])
            for entry in study.entries(model, name)
            if "prompt" in entry
        }
        for name in ("base", "best")
    )
    names = sorted(base, key=lambda name: -base[name][0])
    for scores, color, label in ((base, COLORS["base"], "base model"), (best, COLORS["best"], "fine-tuned")):
        for height, name in enumerate(names):
            score, interval = scores[name]
            axes.plot(interval, [height, height], color=color, linewidth=1)
            axes.plot(score, height, "o", color=color, label=None if height else label)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(log_ticks(*axes.get_xlim()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("mean perplexity")
    axes.legend(fontsize=8)


def name_case(experiment: str, values: tuple[Any, ...], case: Case) -> str:
    """Return the values of a case as text."""
    if experiment == "settings":
        return name_setting(values)
    if experiment == "schedule":
        return f"{values[0]}, {values[1]:,}"
    if experiment == "data":
        return f"{case.runs[0]['training_rows']:,}"
    if experiment == "precision":
        return "bfloat16" if values[0] is None else "NF4"
    return str(values[0])


def sort_cases(experiment: str, cases: dict[tuple[Any, ...], Case]) -> list[tuple[str, Case]]:
    """Return cases with their names, in the order of tables and pictures."""

    def key(values: tuple[Any, ...]) -> Any:
        if experiment == "data":
            return cases[values].runs[0]["training_rows"]
        return values if experiment == "rows_per_step" else 0  # otherwise in the order of the plan

    return [(name_case(experiment, values, cases[values]), cases[values]) for values in sorted(cases, key=key)]


def _draw_settings(study: Study) -> Figure:
    """Draw the grid of learning rate, rank and alpha/r: a panel for each value of alpha/r, a cell for each setting."""
    grids = {model.name: study.compare(model.name, "settings") for model in study.models}
    ratios = {name: sorted({ratio for _, _, ratio in grid}) for name, grid in grids.items()}
    figure = Figure(figsize=(WIDTH, 2.6 * len(grids)), layout="constrained")
    panels = figure.subplots(len(grids), max(map(len, ratios.values())), squeeze=False)
    for line, (name, grid) in zip(panels, grids.items(), strict=True):
        limits = min(case.mean for case in grid.values()), 2 * min(case.mean for case in grid.values())
        for axes in line[len(ratios[name]) :]:
            axes.set_axis_off()
        for axes, ratio in zip(line, ratios[name], strict=False):
            _draw_grid(axes, {(rank, rate): case for (rate, rank, of), case in grid.items() if of == ratio}, limits)
            axes.set_title(f"{MODEL_TITLES[name].partition(',')[0]}, alpha/r {ratio:g}")
    return figure


def _draw_grid(axes: Axes, cells: dict[tuple[int, float], Case], limits: tuple[float, float]) -> None:
    """Draw mean perplexity and the difference from the recipe, by rank (rows) and learning rate (columns)."""
    ranks, rates = (sorted(set(values)) for values in zip(*cells, strict=True))
    matrix = [[cells[rank, rate].mean if (rank, rate) in cells else float("nan") for rate in rates] for rank in ranks]
    axes.imshow(matrix, cmap="Blues", aspect="auto", norm=LogNorm(*limits, clip=True))
    for (rank, rate), case in cells.items():
        interval = case.change.partition(" ")[2] if case.difference else "the recipe's"
        text = f"{case.mean:.2f}\n{interval}" if case.mean < 20 else f"{case.mean:.0f}"
        _write_cell(axes, rates.index(rate), ranks.index(rank), text)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(ranks)), [f"r {rank}" for rank in ranks])
    axes.set_xlabel("learning rate")


def _write_cell(axes: Axes, x: int, y: int, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box)


def _draw_differences(experiment: str, axes: Axes, study: Study, model: str) -> None:
    """Draw each case's difference from the recipe's setting, with its interval, and the seeds as small points."""
    cases = sort_cases(experiment, study.compare(model, experiment))
    axes.axhline(0, color=COLORS["soft"], linewidth=1)
    for position, (_, case) in enumerate(cases):
        if case.difference is None:
            axes.plot(position, 0, "o", color=COLORS["base"])
            continue
        axes.vlines(position, case.difference.low, case.difference.high, color=COLORS["score"])
        axes.plot(position, case.difference.mean, "o", color=COLORS["score"])
        if len(case.runs) > 1:
            seeds = case.difference.seeds
            axes.plot([position + 0.08] * len(seeds), seeds, ".", color=COLORS["score"], alpha=0.5, markersize=4)
    labels = [f"{name}\n{case.mean:.2f}" for name, case in cases]
    axes.set_xticks(range(len(cases)), labels)
    axes.margins(x=0.15)
    axes.set_ylabel("difference in mean perplexity")


def _draw_schedules(axes: Axes, study: Study, model: str) -> None:
    named = sort_cases("schedule", study.compare(model, "schedule"))
    _draw_lines(axes, [(f"{name} steps", case.runs) for name, case in named])


@dataclass(frozen=True)
class PromptPair:
    """A model trained with one prompt and scored with another one.

    Attributes:
        mean: mean perplexity, over seeds.
        low: lowest lower end of the seeds' 95 % intervals over rows.
        high: highest upper end.
    """

    mean: float
    low: float
    high: float


def prompt_matrix(study: Study, model: str) -> dict[tuple[str, str], PromptPair]:
    """Return the scores of the prompts that runs were trained with, by (prompt in training, prompt in scoring)."""
    runs_by_prompt = {prompt: runs for (prompt,), runs in study.cases(model, "prompt", "prompt").items()}
    entries: dict[tuple[str, str], list[Record]] = {}
    for trained, runs in runs_by_prompt.items():
        for entry in (entry for run in runs for entry in run["entries"]["best"]):
            if entry.get("prompt") in runs_by_prompt:
                entries.setdefault((trained, entry["prompt"]), []).append(entry)
    return {
        pair: PromptPair(
            statistics.fmean(entry["mean_perplexity"] for entry in found),
            min(entry["ci95"][0] for entry in found),
            max(entry["ci95"][1] for entry in found),
        )
        for pair, found in entries.items()
    }


def _draw_prompt_matrix(axes: Axes, study: Study, model: str) -> None:
    matrix = prompt_matrix(study, model)
    names = list(dict.fromkeys(trained for trained, _ in matrix))
    axes.imshow([[matrix[y, x].mean for x in names] for y in names], cmap="Blues", aspect="auto", norm="log")
    for (trained, scored), pair in matrix.items():
        text = f"{pair.mean:.2f}\n[{pair.low:.2f}, {pair.high:.2f}]"
        _write_cell(axes, names.index(scored), names.index(trained), text)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("prompt in training")


def _draw_selection(axes: Axes, study: Study, model: str) -> None:
    """Draw what each criterion costs, with its interval, and single runs as small points."""
    selections = {name: study.selection(model, name) for name in CRITERIA}
    named = [(name, selection) for name, selection in selections.items() if selection.runs]
    for position, (_, selection) in enumerate(named):
        axes.bar(position, selection.cost, 0.4, color=COLORS["best"])
        axes.vlines(position, *selection.interval, color=COLORS["ink"])
        costs = [cost for cost in selection.costs if cost > 0]
        axes.plot([position + 0.3] * len(costs), costs, ".", color=COLORS["best"], alpha=0.4, markersize=4)
    labels = [f"{name.replace('_', ' ')}\n{selection.different} of {selection.runs} runs" for name, selection in named]
    axes.set_xticks(range(len(named)), labels)
    axes.set_ylim(0, max(0.01, 1.05 * max(selection.worst for _, selection in named)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("increase of mean perplexity")


def _draw_transfer(axes: Axes, study: Study, model: str) -> None:
    points = [point for run in study.select(model) for point in run["curve"]]
    x, y = ([point[file]["mean_perplexity"] for point in points] for file in ("eval", "held_out"))
    limit_x, limit_y = 1.6 * min(x), 1.6 * min(y)
    axes.plot(x, y, ".", color=COLORS["score"], alpha=0.4, markersize=4)
    for values, color, label in ((x, COLORS["best"], "evaluation file"), (y, COLORS["dev"], "held-out rows")):
        winner = values.index(min(values))
        axes.plot(x[winner], y[winner], "*", color=color, markersize=13, label=f"best on the {label}")
    axes.set_xlim(0.97 * min(x), limit_x)
    axes.set_ylim(0.97 * min(y), limit_y)
    axes.set_ylabel("on the held-out rows")
    axes.legend(fontsize=8)
