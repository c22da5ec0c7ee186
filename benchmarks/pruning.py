"""Measure how well Optuna's pruners decide: does the best of 27 settings survive, and how many steps are saved?

The study (docs/study.md) has trained 27 settings of the embedded model to their end, with five seeds, and has scored
every checkpoint. This gives its scores to the pruners of `hw3 search` as if the trials ran one after the other, in many
random orders, and compares the trial that wins with the one that wins if no trial is stopped.

    python benchmarks/pruning.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
from benchmark_report import describe_machine, write_report
from optuna.pruners import BasePruner

from hw3.evaluation.bootstrap import bootstrap_interval
from hw3.search.sampling import build_pruner
from hw3.search.space import SearchSpace, load_space

SPACE = Path("recipes/search/tiny.yaml")  # for the pruner's other settings
MODEL, EXPERIMENT = "tiny", "settings"
ORDERS = 100  # random orders of the settings for each seed
BOOTSTRAP_SAMPLES = 2000
COLUMNS = {
    "setting": "pruner",
    "reduction_factor": "reduction factor",
    "min_resource": "first decision at step",
    "compares": "compares",
    "searches": "searches",
    "kept_best": "best setting wins",
    "not_worse": "winner not significantly worse",
    "within_interval": "winner in the best one's interval",
    "steps_saved": "steps saved",
    "loss": "score lost, median",
    "worst_loss": "score lost, at most",
}


@dataclass(frozen=True)
class Curve:
    """The scores of a run that was not stopped.

    Attributes:
        scores: mean perplexity on the held-out rows, by optimizer step.
        rows: perplexity of each held-out row at the best checkpoint, shape (rows,).
        ci95: bootstrap interval of the best checkpoint's score.
    """

    scores: dict[int, float]
    rows: np.ndarray
    ci95: tuple[float, float]

    @property
    def best(self) -> float:
        """Score of the best checkpoint."""
        return min(self.scores.values())


@dataclass(frozen=True)
class Outcome:
    """A search in which a pruner has stopped trials.

    Attributes:
        winner: index of the curve with the lowest score among those that were not stopped.
        saved: share of the optimizer steps that were not done.
    """

    winner: int
    saved: float


def read_curves(folder: Path) -> dict[int, list[Curve]]:
    """Return the curves of all settings by seed.

    Args:
        folder: the folder of the study's `runs.json` and `rows.npz`.
    """
    content = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    curves: dict[int, list[Curve]] = {}
    with np.load(folder / "rows.npz") as saved:
        for run in content["runs"]:
            if run["model"] != MODEL or EXPERIMENT not in run["experiments"]:
                continue
            scores = {point["step"]: point["held_out"] for point in run["curve"]}
            curve = Curve(
                {step: score["mean_perplexity"] for step, score in scores.items()},
                saved[f"{run['id']}/held_out"].astype(np.float64),
                tuple(scores[run["best_step"]]["ci95"]),
            )
            curves.setdefault(run["seed"], []).append(curve)
    return curves


def replay(curves: Sequence[Curve], pruner: BasePruner, order: int, *, latest: bool = False) -> Outcome:
    """Search among recorded runs, one after the other in a random order.

    Args:
        curves: one for each trial.
        pruner: a pruner without state.
        order: seed of the order. Hyperband draws a trial's bracket from the study's name, which is made of it.
        latest: give the pruner the latest score; `hw3 search` gives it the best one so far.
    """
    study = optuna.create_study(study_name=f"order-{order}", pruner=pruner)
    last_step, complete, steps_done = max(curves[0].scores), {}, 0
    for number in random.Random(order).sample(range(len(curves)), len(curves)):
        trial, best = study.ask(), float("inf")
        for step, score in sorted(curves[number].scores.items()):
            best = min(best, score)
            trial.report(score if latest else best, step)
            if step < last_step and trial.should_prune():
                break
        else:
            complete[number] = best
        steps_done += step
        study.tell(trial, best)
    winner = min(complete, key=lambda number: complete[number])
    return Outcome(winner, 1 - steps_done / (last_step * len(curves)))


def measure(curves: dict[int, list[Curve]], space: SearchSpace, orders: int, *, latest: bool = False) -> dict:
    """Replay searches of all seeds with the space's pruner; return a row of the report."""
    saved, losses, best, not_worse, within = [], [], 0, 0, 0
    for of_seed in curves.values():
        steps = sorted(of_seed[0].scores)
        target = min(of_seed, key=lambda curve: curve.best)
        worse = [_is_worse(curve, target) for curve in of_seed]
        for order in range(1 if space.pruner == "none" else orders):
            outcome = replay(of_seed, build_pruner(space, steps[0], steps[-1]), order, latest=latest)
            winner = of_seed[outcome.winner]
            saved.append(outcome.saved)
            losses.append(winner.best / target.best - 1)
            best += winner is target
            not_worse += not worse[outcome.winner]
            within += winner.best <= target.ci95[1]
    is_none, count = space.pruner == "none", len(saved)
    return {
        "setting": space.pruner.replace("_", " "),
        "reduction_factor": "" if is_none else space.reduction_factor,
        "min_resource": "" if is_none else space.min_resource,
        "compares": "" if is_none else "latest score" if latest else "best score so far",
        "searches": count,
        "kept_best": f"{best / count:.0%}",
        "not_worse": f"{not_worse / count:.0%}",
        "within_interval": f"{within / count:.0%}",
        "steps_saved": f"{statistics.fmean(saved):.1%}",
        "loss": f"{statistics.median(losses):.1%}",
        "worst_loss": f"{max(losses):.1%}",
    }


def _is_worse(curve: Curve, target: Curve) -> bool:
    """Return whether a setting's best checkpoint is significantly worse than the best setting's, row by row."""
    low, _ = bootstrap_interval((curve.rows - target.rows).tolist(), samples=BOOTSTRAP_SAMPLES, seed=0)
    return low > 0


def main() -> int:
    """Replay the searches and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--study", type=Path, default=Path("docs/study"), help="folder of runs.json and rows.npz")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--orders", type=int, default=ORDERS)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    curves = read_curves(arguments.study)
    space = replace(load_space(SPACE), pruner="none")
    rows = [measure(curves, space, arguments.orders)]
    first_steps = sorted(curves[min(curves)][0].scores)[:3]
    for pruner in ("successive_halving", "hyperband"):
        for factor in (2, 3, 4):
            for step in first_steps:
                space = replace(space, pruner=pruner, reduction_factor=factor, min_resource=step)
                rows.append(measure(curves, space, arguments.orders))
                if step == first_steps[0]:
                    rows.append(measure(curves, space, arguments.orders, latest=True))
                print(json.dumps(rows[-1]), flush=True)
    write_report(arguments.output, "pruning", describe_machine(), rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
