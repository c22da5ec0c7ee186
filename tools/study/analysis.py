"""What follows from the study's records: scores of settings with intervals, and how checkpoints are selected."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from study.plan import StudyModel, read_plan, recipe_values

RESAMPLES = 2000
RESAMPLING_SEED = 0
COMPARABLE = 4 / 3  # times the lowest score of all runs; runs that never reach it are no candidates for a report
SETTINGS_KEYS = ("training.learning_rate", "lora.r", "alpha_over_r")
SCHEDULE_KEYS = ("training.lr_scheduler_type", "training.max_steps")
# Of each experiment, the settings that its cases differ in.
CASE_KEYS: dict[str, tuple[str, ...]] = {
    "settings": SETTINGS_KEYS,
    "schedule": SCHEDULE_KEYS,
    "rows_per_step": ("rows_per_step",),
    "data": ("train_share",),
    "precision": ("quantization",),
    "prompt": ("prompt",),
}
# Criteria that could select a checkpoint instead of the mean perplexity, and whether the highest is the best.
CRITERIA = {"eval_loss": False, "token_perplexity": False, "bleu": True, "chrf": True}
HALVES = 500  # random divisions of a file's rows in `optimism`

Record = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Mean perplexity of a setting, over its seeds and the rows of a file.

    Attributes:
        mean: mean over seeds.
        low: lower end of the 95 % bootstrap interval, with seeds and rows resampled together.
        high: upper end.
        seeds: mean perplexity of each seed.
    """

    mean: float
    low: float
    high: float
    seeds: list[float]


@dataclass(frozen=True)
class Case:
    """A setting of an experiment, compared with the experiment's reference.

    Attributes:
        runs: its runs, one per seed.
        estimate: its score on the evaluation file.
        difference: by how much its score is higher than the reference's, with seeds and rows paired. None for the
            reference itself, and if the reference has no finished run with the same seed.
        best_step: median step of the best checkpoints.
        last: mean score of the last checkpoints.
    """

    runs: list[Record]
    estimate: Estimate
    difference: Estimate | None
    best_step: float
    last: float

    @property
    def mean(self) -> float:
        """Mean perplexity."""
        return self.estimate.mean

    @property
    def score(self) -> str:
        """Mean perplexity and its interval, as text."""
        return f"{self.mean:.2f} [{self.estimate.low:.2f}, {self.estimate.high:.2f}]"

    @property
    def change(self) -> str:
        """Difference from the reference and its interval, as text; empty without one."""
        if self.difference is None:
            return ""
        mean, low, high = (
            f"{value:+.2f}".replace("-", "−")
            for value in (self.difference.mean, self.difference.low, self.difference.high)
        )
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Selection:
    """How a criterion selects checkpoints, compared with the mean perplexity.

    Attributes:
        runs: number of runs.
        different: runs in which it selects another checkpoint.
        costs: by how much the mean perplexity of its checkpoint is higher than the lowest, as a fraction, for each run.
    """

    runs: int
    different: int
    costs: list[float]

    @property
    def share(self) -> float:
        """Share of the runs in which another checkpoint is selected."""
        return self.different / self.runs

    @property
    def cost(self) -> float:
        """Mean cost."""
        return statistics.fmean(self.costs)

    @property
    def worst(self) -> float:
        """Highest cost."""
        return max(self.costs)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean cost, with runs resampled."""
        return _interval(np.array(self.costs)[:, None])


@dataclass(frozen=True)
class Transfer:
    """The best of all checkpoints of all runs on one file, scored on another one.

    Attributes:
        own: its score on the file that selected it.
        other: its score on the other file.
        lowest: the lowest score on the other file.
        rank: its rank on the other file.
        checkpoints: number of checkpoints.
    """

    own: float
    other: float
    lowest: float
    rank: int
    checkpoints: int

    @property
    def loss(self) -> float:
        """By how much its score is higher than the lowest on the other file, as a fraction."""
        return self.other / self.lowest - 1


class Study:
    """The records of the finished runs.

    Args:
        folder: the folder of `runs.json` and `rows.npz`.
    """

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
        self.plan = read_plan(Path(content["plan"]))
        self.runs: list[Record] = content["runs"]
        with np.load(folder / "rows.npz") as saved:
            self._rows = {name: saved[name].astype(np.float64) for name in saved.files}

    @cached_property
    def models(self) -> list[StudyModel]:
        """The models that have finished runs."""
        names = {run["model"] for run in self.runs}
        return [model for name, model in self.plan.models.items() if name in names]

    def select(self, model: str, experiment: str | None = None) -> list[Record]:
        """Return the runs of a model, or of one of its experiments."""
        return [
            run
            for run in self.runs
            if run["model"] == model and (experiment is None or experiment in run["experiments"])
        ]

    def value(self, run: Record, key: str) -> Any:
        """Return a setting of a run, in the plan's notation."""
        defaults = recipe_values(self.plan.models[run["model"]].recipe)
        return run["settings"].get(key, defaults.get(key))

    def cases(self, model: str, experiment: str, *keys: str) -> dict[tuple[Any, ...], list[Record]]:
        """Return the runs of an experiment by the values of some settings, one per seed."""
        cases: dict[tuple[Any, ...], list[Record]] = {}
        for run in self.select(model, experiment):
            cases.setdefault(tuple(self.value(run, key) for key in keys), []).append(run)
        return cases

    def perplexities(self, runs: Sequence[Record], file: str = "eval") -> np.ndarray:
        """Return row perplexities of the best checkpoints, shape (runs, rows)."""
        return np.stack([self._rows[f"{run['id']}/{file}"] for run in runs])

    def estimate(self, runs: Sequence[Record], file: str = "eval") -> Estimate:
        """Return the score of runs that differ in the seed only, at their best checkpoints."""
        seeds = [best_point(run)[file]["mean_perplexity"] for run in runs]
        low, high = _interval(self.perplexities(runs, file))
        return Estimate(statistics.fmean(seeds), low, high, seeds)

    def difference(self, first: Sequence[Record], second: Sequence[Record]) -> Estimate:
        """Return by how much the second runs' scores are higher than the first's; seeds and rows are paired."""
        by_seed = {run["seed"]: run for run in first}
        pairs = [(by_seed[run["seed"]], run) for run in second if run["seed"] in by_seed]
        seeds = [best_point(b)["eval"]["mean_perplexity"] - best_point(a)["eval"]["mean_perplexity"] for a, b in pairs]
        rows = self.perplexities([b for _, b in pairs]) - self.perplexities([a for a, _ in pairs])
        low, high = _interval(rows)
        return Estimate(statistics.fmean(seeds), low, high, seeds)

    def compare(self, model: str, experiment: str) -> dict[tuple[Any, ...], Case]:
        """Return an experiment's cases, by the values of `CASE_KEYS`.

        The reference is the recipe's setting. Schedules include the recipe's, and are compared with the longest
        constant one, which contains the shorter ones.
        """
        groups = self.cases(model, experiment, *CASE_KEYS[experiment])
        if experiment == "schedule":
            groups = self.cases(model, "recipe", *SCHEDULE_KEYS) | groups
            reference = max(((kind, steps) for kind, steps in groups if kind == "constant"), default=None)
            groups = {values: groups[values] for values in groups if values[0] != "constant" or values == reference}
        else:
            defaults = recipe_values(self.plan.models[model].recipe)
            reference = tuple(defaults[key] for key in CASE_KEYS[experiment])
        return {
            values: self.describe(runs, () if values == reference else groups.get(reference, ()))
            for values, runs in groups.items()
        }

    def describe(self, runs: list[Record], reference: Sequence[Record] = ()) -> Case:
        """Return runs that differ in the seed only as a case."""
        has_pairs = bool({run["seed"] for run in runs} & {run["seed"] for run in reference})
        return Case(
            runs=runs,
            estimate=self.estimate(runs),
            difference=self.difference(reference, runs) if has_pairs else None,
            best_step=statistics.median(run["best_step"] for run in runs),
            last=statistics.fmean(_mean_perplexity(run["curve"][-1]) for run in runs),
        )

    def best_case(self, model: str, experiment: str, *keys: str) -> tuple[Any, ...]:
        """Return the setting with the lowest mean over seeds on the held-out rows."""
        cases = self.cases(model, experiment, *keys)
        return min(cases, key=lambda case: self.estimate(cases[case], "held_out").mean)

    # --- selection ----------------------------------------------------------------------------------------------------

    def comparable(self, model: str) -> list[Record]:
        """Return the runs of a model that a report would consider: see `COMPARABLE`."""
        lowest = {run["id"]: min(map(_mean_perplexity, run["curve"])) for run in self.select(model)}
        limit = COMPARABLE * min(lowest.values())
        return [run for run in self.select(model) if lowest[run["id"]] <= limit]

    def selection(self, model: str, criterion: str) -> Selection:
        """Compare the checkpoints that a criterion selects on the evaluation file with those of the mean perplexity."""
        curves = [run["curve"] for run in self.comparable(model)]
        if criterion in ("bleu", "chrf"):
            curves = [curve for curve in curves if "metrics" in curve[0]]
        costs, different = [], 0
        for curve in curves:
            by_perplexity = min(curve, key=_mean_perplexity)
            selected = (max if CRITERIA[criterion] else min)(curve, key=_read_criterion(criterion))
            different += selected is not by_perplexity
            costs.append(_mean_perplexity(selected) / _mean_perplexity(by_perplexity) - 1)
        return Selection(len(curves), different, costs)

    def transfer(self, model: str, chosen_on: str, scored_on: str) -> Transfer:
        """Select the best of all checkpoints of all runs on one file, and score it on another one."""
        points = [point for run in self.select(model) for point in run["curve"]]
        winner = min(points, key=lambda point: point[chosen_on]["mean_perplexity"])
        scores = sorted(point[scored_on]["mean_perplexity"] for point in points)
        other = winner[scored_on]["mean_perplexity"]
        return Transfer(winner[chosen_on]["mean_perplexity"], other, scores[0], scores.index(other) + 1, len(points))

    def optimism(self, model: str) -> Estimate:
        """Return by what fraction a winner's score rises on other rows.

        The best run is selected on a random half of the evaluation rows, and scored on the other half. The rise beyond
        the difference of all runs between both halves is averaged over `HALVES` divisions; 95 % of the divisions lie
        between `low` and `high`.
        """
        rows = self.perplexities(self.select(model))
        generator = np.random.default_rng(RESAMPLING_SEED)
        rises = []
        for _ in range(HALVES):
            order = generator.permutation(rows.shape[1])
            first, second = (rows[:, half].mean(axis=1) for half in np.array_split(order, 2))
            winner = first.argmin()
            rises.append(second[winner] / first[winner] / np.median(second / first) - 1)
        low, high = np.quantile(rises, (0.025, 0.975))
        return Estimate(float(np.mean(rises)), float(low), float(high), [])

    # --- prompts and few-shot examples --------------------------------------------------------------------------------

    def entries(self, model: str, name: str, experiment: str = "questions") -> list[Record]:
        """Return what was scored beside the learning curve, of `base` or `best`, in an experiment's runs."""
        return [
            {**entry, "run": run["id"]}
            for run in self.select(model, experiment)
            for entry in run.get("entries", {}).get(name, [])
        ]

    def predictions(self, model: str) -> Record:
        """Return the predictions of a model, with those of its base, and their metrics."""
        return next(run["predictions"] for run in self.select(model) if "best" in run.get("predictions", {}))


def best_point(run: Record) -> Record:
    """Return the scores of a run's best checkpoint, which was selected on the held-out rows."""
    return next(point for point in run["curve"] if point["step"] == run["best_step"])


def mean_curve(runs: Iterable[Record], file: str = "eval") -> list[tuple[int, float, float, float]]:
    """Return (step, mean, lowest, highest) over runs with the same checkpoints."""
    curves = [[(point["step"], point[file]["mean_perplexity"]) for point in run["curve"]] for run in runs]
    lines = []
    for points in zip(*curves, strict=True):
        values = [value for _, value in points]
        lines.append((points[0][0], statistics.fmean(values), min(values), max(values)))
    return lines


def _interval(rows: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of an array (seeds, rows), with seeds and rows resampled."""
    generator = np.random.default_rng(RESAMPLING_SEED)
    seeds, count = rows.shape
    means = [
        rows[np.ix_(generator.integers(0, seeds, seeds), generator.integers(0, count, count))].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _mean_perplexity(point: Record) -> float:
    return point["eval"]["mean_perplexity"]


def _read_criterion(name: str) -> Callable[[Record], float]:
    if name in ("bleu", "chrf"):
        return lambda point: point["metrics"]["all"][name]
    return lambda point: point["eval"][name]
