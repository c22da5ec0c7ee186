"""Values of the study's records, and of published runs, that the sentences and tables of docs/study.md name."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from study.analysis import CRITERIA, SETTINGS_KEYS, Study
from study.figures import name_setting, prompt_matrix

from document_blocks.sources import REPOSITORY, read_json

FOLDER = "docs/study"


@cache
def load_study() -> Study:
    """Read the study's records."""
    return Study(REPOSITORY / FOLDER)


@cache
def read_errors() -> dict[str, Any]:
    """Read the errors of the outputs that were read."""
    return yaml.safe_load((REPOSITORY / FOLDER / "errors.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Score:
    """A score among others, such as the lowest of all prompts."""

    name: str
    mean: float


@dataclass(frozen=True)
class Spread:
    """Scores with several samples of few-shot examples."""

    values: list[float]

    @property
    def mean(self) -> float:
        """Mean of the samples."""
        return statistics.fmean(self.values)

    @property
    def text(self) -> str:
        """Mean, and the range if there are several samples."""
        low, high = min(self.values), max(self.values)
        return f"{self.mean:.2f}" if len(self.values) == 1 else f"{self.mean:.2f} ({low:.2f}–{high:.2f})"


@cache
def compute_values() -> dict[str, Any]:
    """Return every value that the sentences may name, by nested names."""
    study = load_study()
    steps = sum(run["steps"] for run in study.runs)
    return {
        "runs": len(study.runs),
        "planned": len(study.plan.runs),
        "missing": _name_missing(study),
        "checkpoints": sum(len(run["curve"]) for run in study.runs),
        "steps": steps,
        "minutes": sum(sum(run["seconds"].values()) for run in study.runs) / 60,
        "devices": " / ".join(sorted({run["device"] for run in study.runs})),
        "published": {name: _read_published(f"docs/{name}") for name in ("tiny", "smollm2")},
        "errors": _count_errors(),
        "smollm2_settings": {
            number: row["best_mean_perplexity"]
            for number, row in enumerate(read_json("docs/smollm2/settings.json")["rows"], 1)
        },
        **{model.name: _model_values(study, model.name) for model in study.models},
    }


def _read_published(folder: str) -> dict[str, Any]:
    """Return the scores of a run of `hw3 train`."""
    entries = read_json(f"{folder}/results.json")["entries"]
    curve = sorted((entry for entry in entries if entry["step"] and not entry["shots"]), key=lambda e: e["step"])
    best = min(curve, key=lambda entry: entry["mean_perplexity"])
    low, high = best["mean_perplexity_ci95"]
    return {
        "base": {entry["shots"]: entry["mean_perplexity"] for entry in entries if entry["checkpoint"] is None},
        "best": best["mean_perplexity"],
        "score": f"{best['mean_perplexity']:.2f} [{low:.2f}, {high:.2f}]",
        "step": best["step"],
        "last": curve[-1]["mean_perplexity"],
        "last_step": curve[-1]["step"],
    }


def _count_errors() -> dict[str, Any]:
    """Return how many outputs of each model were read, how many have no error, and the errors by direction and kind."""
    counts = {}
    for model, rows in read_errors()["outputs"].items():
        kinds = {"m2c": Counter(), "c2m": Counter()}
        for row_id, row in rows.items():
            kinds[row_id[-3:]].update(row["kinds"] or ["none"])
        correct = sum(direction["none"] for direction in kinds.values())
        counts[model] = {"read": len(rows), "correct": correct, **kinds}
    return counts


def _name_missing(study: Study) -> str:
    """Return the experiments with fewer runs than planned, and how many are missing."""
    finished = {run["id"] for run in study.runs}
    missing = Counter(run.experiments[0] for run in study.plan.runs if run.id not in finished)
    return ", ".join(f"`{experiment}` ({count})" for experiment, count in missing.items())


def _model_values(study: Study, model: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "runs": len(study.select(model)),
        "missing": sum(run.model.name == model for run in study.plan.runs) - len(study.select(model)),
        "settings": _setting_values(study, model),
        "schedule": {f"{kind} {steps}": case for (kind, steps), case in study.compare(model, "schedule").items()},
        "rows_per_step": {rows: case for (rows,), case in study.compare(model, "rows_per_step").items()},
        "data": {case.runs[0]["training_rows"]: case for case in study.compare(model, "data").values()},
        "precision": {name or "bf16": case for (name,), case in study.compare(model, "precision").items()},
        "prompt": {name: case for (name,), case in study.compare(model, "prompt").items()},
        "pairs": _prompt_pair_values(study, model),
        "select": {name: study.selection(model, name) for name in CRITERIA},
        "public": study.transfer(model, "eval", "held_out"),
        "held_out": study.transfer(model, "held_out", "eval"),
        "optimism": study.optimism(model),
        "comparable": len(study.comparable(model)),
    }
    recipe = study.select(model, "recipe")
    for name in ("recipe", "study", "unquantized"):
        if runs := study.select(model, name):
            values[name] = study.describe(runs, recipe if name != "recipe" else ())
    if study.select(model, "questions"):
        values |= {name: _question_values(study, model, name) for name in ("base", "best")}
        values["copying"] = study.predictions(model)["copying sample"]
    return values


def _setting_values(study: Study, model: str) -> dict[str, Any]:
    """Return the grid's best setting on the held-out rows, its worst, and how many differ from the recipe's."""
    grid = study.compare(model, "settings")
    best = study.best_case(model, "settings", *SETTINGS_KEYS)
    worst = max(grid, key=lambda values: grid[values].mean)
    differences = [case.difference for case in grid.values() if case.difference is not None]
    counts = {
        "count": len(grid),
        "others": len(differences),
        "worse": sum(difference.low > 0 for difference in differences),
        "better": sum(difference.high < 0 for difference in differences),
    }
    return {
        **counts,
        "similar": counts["others"] - counts["worse"] - counts["better"],
        "best": grid[best],
        "best_name": name_setting(best),
        "worst": grid[worst],
        "worst_name": name_setting(worst),
        **{f"{rate:g} {rank} {ratio:g}": case for (rate, rank, ratio), case in grid.items()},
    }


def _prompt_pair_values(study: Study, model: str) -> dict[str, Any]:
    """Return how a model scores with the prompt of its training and with other ones."""
    matrix = {pair: score.mean for pair, score in prompt_matrix(study, model).items()}
    rises = {pair: mean / matrix[pair[0], pair[0]] - 1 for pair, mean in matrix.items() if pair[0] != pair[1]}
    lowest, highest = min(rises, key=rises.__getitem__), max(rises, key=rises.__getitem__)
    return {
        "own_lowest": min(mean for (trained, scored), mean in matrix.items() if trained == scored),
        "own_highest": max(mean for (trained, scored), mean in matrix.items() if trained == scored),
        "lowest": {"trained": lowest[0], "scored": lowest[1], "rise": rises[lowest], "mean": matrix[lowest]},
        "highest": {"trained": highest[0], "scored": highest[1], "rise": rises[highest], "mean": matrix[highest]},
        "rise": statistics.fmean(rises.values()),
    }


def _question_values(study: Study, model: str, name: str) -> dict[str, Any]:
    """Return the scores of a base model, or of its best checkpoint, with prompts and few-shot examples."""
    prompts = {entry["prompt"]: entry["mean_perplexity"] for entry in study.entries(model, name) if "prompt" in entry}
    ordered = [Score(prompt, prompts[prompt]) for prompt in sorted(prompts, key=prompts.__getitem__)]
    few_shot: dict[str, dict[int, Spread]] = {"prompt": {}, "train": {}}
    for (source, shots), spread in few_shot_scores(study, model, name).items():
        few_shot[source][shots] = spread
    metrics = study.predictions(model)[name]["metrics"]
    extremes = {"lowest": ordered[0], "highest": ordered[-1], "count": len(ordered)}
    return {"zero_shot": prompts["study"], "prompts": extremes, **few_shot, **metrics}


def few_shot_scores(study: Study, model: str, name: str) -> dict[tuple[str, int], Spread]:
    """Return the scores by (source of the examples, number of examples)."""
    scores: dict[tuple[str, int], list[float]] = {}
    for entry in study.entries(model, name):
        if "shots" in entry:
            scores.setdefault((entry["examples"], entry["shots"]), []).append(entry["mean_perplexity"])
    return {key: Spread(found) for key, found in scores.items()}
