"""The pictures of docs/study.md, one for each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from hw3.common.figures import figure_settings
from hw3.evaluation.learning_curve import COLORS, log_ticks
from study.analysis import CRITERIA, Estimate, Record, Study, mean_curve
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

Label = Callable[[tuple[Any, ...]], str]


def draw_all(study: Study) -> dict[str, Figure]:
    """Return the picture of every experiment that has finished runs, by the name of its file."""
    drawings: dict[str, tuple[Callable[[Axes, Study, str], None], str]] = {
        "few_shot": (_draw_few_shot, "few-shot examples"),
        "prompts": (_draw_prompts, "mean perplexity"),
        "schedule": (_draw_schedules, "optimizer step"),
        "rank": (_cases("rank", "lora.r", lambda case: f"r {case[0]}"), ""),
        "rows_per_step": (_cases("rows_per_step", "rows_per_step", lambda case: str(case[0])), "rows per step"),
        "data": (_draw_data, "training rows"),
        "precision": (_cases("precision", "quantization", _name_precision), ""),
        "prompt": (_draw_prompt_matrix, "prompt in scoring"),
    }
    with figure_settings(_STYLE):
        figures = {
            "curves": _per_model(study, study.models, _draw_curves, "optimizer step"),
            "settings": _draw_settings(study),
            "selection": _per_model(study, study.models, _draw_selection),
            "transfer": _per_model(study, study.models, _draw_transfer, "mean perplexity on the evaluation file"),
        }
        for name, (draw, xlabel) in drawings.items():
            experiment = "questions" if name in ("few_shot", "prompts") else name
            models = [model for model in study.models if study.select(model.name, experiment)]
            if models:
                figures[name] = _per_model(study, models, draw, xlabel)
    return figures


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
    named.append((f"best of search: {name_setting(best)}", study.cases(model, "settings", *SETTINGS_KEYS)[best]))
    _draw_lines(axes, [(name, runs) for name, runs in named if runs])


SETTINGS_KEYS = ("training.learning_rate", "lora.r", "alpha_over_r")


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
    draw_few_shot(axes, scores["base"], scores["best"])


# (Number of examples, mean perplexity) by source of the examples: `prompt`, or `train` if they were drawn.
FewShotScores = dict[str, list[tuple[int, float]]]


def draw_few_shot(axes: Axes, base: FewShotScores, best: FewShotScores) -> None:
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
    draw_prompts(axes, base, best)


# Mean perplexity and its interval, by prompt.
PromptScores = dict[str, tuple[float, Sequence[float]]]


def draw_prompts(axes: Axes, base: PromptScores, best: PromptScores) -> None:
    """Draw scores by prompt, of the base model and fine-tuned, with their intervals."""
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


def draw_prompting(few_shot: tuple[FewShotScores, FewShotScores], prompts: tuple[PromptScores, PromptScores]) -> Figure:
    """Draw few-shot examples and prompts side by side; each pair is of the base model and fine-tuned."""
    with figure_settings(_STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_few_shot(left, *few_shot)
        draw_prompts(right, *prompts)
        for axes in (left, right):
            axes.grid(axis="y")
    return figure


def _draw_settings(study: Study) -> Figure:
    """Draw the grid of learning rate, rank and alpha/r: a panel for each value of alpha/r."""
    grids = {model.name: study.cases(model.name, "settings", *SETTINGS_KEYS) for model in study.models}
    ratios = {name: sorted({ratio for _, _, ratio in grid}) for name, grid in grids.items()}
    figure = Figure(figsize=(WIDTH, HEIGHT * len(grids)), layout="constrained")
    panels = figure.subplots(len(grids), max(map(len, ratios.values())), squeeze=False)
    for line, (name, grid) in zip(panels, grids.items(), strict=True):
        for axes in line[len(ratios[name]) :]:
            axes.set_axis_off()
        for axes, ratio in zip(line, ratios[name], strict=False):
            for color, rank in zip(PALETTE, sorted({rank for _, rank, _ in grid}), strict=False):
                rates = sorted({rate for rate, of_rank, of_ratio in grid if (of_rank, of_ratio) == (rank, ratio)})
                estimates = [study.estimate(grid[rate, rank, ratio]) for rate in rates]
                _draw_estimates(axes, [float(rate) for rate in rates], estimates, color, f"r {rank}")
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            if axes is not line[0]:
                axes.sharey(line[0])
            axes.set_title(f"{MODEL_TITLES[name].partition(',')[0]}, alpha/r {ratio:g}")
            axes.set_xlabel("learning rate")
            axes.grid(axis="y")
            axes.legend(fontsize=8)
        line[0].set_ylabel("mean perplexity")
        _log_scale(line[0])
    return figure


def _draw_estimates(
    axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], color: str, label: str | None = None
) -> None:
    """Draw means with their intervals, and the seeds as small points."""
    axes.plot(x, [estimate.mean for estimate in estimates], color=color, marker="o", markersize=5, label=label)
    axes.vlines(x, *zip(*((estimate.low, estimate.high) for estimate in estimates), strict=True), color=color)
    for position, estimate in zip(x, estimates, strict=True):
        axes.plot([position] * len(estimate.seeds), estimate.seeds, ".", color=color, alpha=0.5, markersize=3)


def _cases(experiment: str, key: str, label: Label) -> Callable[[Axes, Study, str], None]:
    """Return a function that draws the scores of an experiment's cases."""

    def draw(axes: Axes, study: Study, model: str) -> None:
        cases = study.cases(model, experiment, key)
        ordered = sorted(cases, key=lambda case: (case[0] is None, str(case[0]).zfill(4)))
        estimates = [study.estimate(cases[case]) for case in ordered]
        for position, estimate in enumerate(estimates):
            _draw_estimates(axes, [position], [estimate], COLORS["score"])
        axes.set_xticks(range(len(ordered)), [label(case) for case in ordered])
        axes.margins(x=0.2)
        axes.set_ylabel("mean perplexity")

    return draw


def _name_precision(case: tuple[Any, ...]) -> str:
    return "not quantized" if case[0] is None else "NF4"


def _draw_schedules(axes: Axes, study: Study, model: str) -> None:
    keys = ("training.lr_scheduler_type", "training.max_steps")
    cases = study.cases(model, "schedule", *keys) | study.cases(model, "recipe", *keys)
    _draw_lines(axes, [(f"{kind}, {steps:,} steps", cases[kind, steps]) for kind, steps in sorted(cases)])


def _draw_data(axes: Axes, study: Study, model: str) -> None:
    cases = study.cases(model, "data", "train_share")
    by_rows = {runs[0]["training_rows"]: runs for runs in cases.values()}
    rows = sorted(by_rows)
    _draw_estimates(axes, rows, [study.estimate(by_rows[count]) for count in rows], COLORS["score"])
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(rows, [f"{count:,}" for count in rows])
    axes.set_ylabel("mean perplexity")


def prompt_matrix(study: Study, model: str) -> tuple[list[str], list[str], list[list[float]]]:
    """Return the prompts of training, those of scoring, and the mean perplexity of each pair, over seeds."""
    cases = study.cases(model, "prompt", "prompt")
    trained = [prompt for (prompt,) in cases]
    scored = [name for name in study.plan.models[model].prompts if name in trained]
    matrix = []
    for (prompt,) in cases:
        ids = {run["id"] for run in cases[prompt,]}
        entries = [entry for entry in study.entries(model, "best", "prompt") if entry["run"] in ids]
        line = []
        for name in scored:
            values = [entry["mean_perplexity"] for entry in entries if entry.get("prompt") == name]
            line.append(sum(values) / len(values) if values else float("nan"))
        matrix.append(line)
    return trained, scored, matrix


def _draw_prompt_matrix(axes: Axes, study: Study, model: str) -> None:
    trained, scored, matrix = prompt_matrix(study, model)
    axes.imshow(matrix, cmap="Blues", aspect="auto", norm="log")
    for y, line in enumerate(matrix):
        for x, value in enumerate(line):
            axes.text(
                x, y, f"{value:.2f}", ha="center", va="center", bbox={"facecolor": "white", "alpha": 0.7, "pad": 1}
            )
    axes.set_xticks(range(len(scored)), scored, rotation=20)
    axes.set_yticks(range(len(trained)), trained)
    axes.set_ylabel("prompt in training")


def _draw_selection(axes: Axes, study: Study, model: str) -> None:
    for position, criterion in enumerate(CRITERIA):
        selection = study.selection(model, criterion)
        if not selection.runs:
            continue
        share = selection.different / selection.runs
        axes.bar(position - 0.2, share, 0.35, color=COLORS["score"], label=None if position else "another checkpoint")
        worst, cost = max(selection.costs), sum(selection.costs) / selection.runs
        label = None if position else "mean perplexity lost: mean, and the worst run"
        axes.bar(position + 0.2, cost, 0.35, color=COLORS["best"], label=label)
        axes.plot(position + 0.2, worst, "_", color=COLORS["best"], markersize=12)
    axes.set_xticks(range(len(CRITERIA)), [name.replace("_", " ") for name in CRITERIA])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(fontsize=8)


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
