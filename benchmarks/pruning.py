"""Measure how well Optuna's pruners decide: does the best of 27 settings survive, and how many steps are saved?

`record` trains every setting to its end with several seeds, and stores the scores of all checkpoints. A recording that
was stopped goes on. `replay` gives the recorded scores to Optuna's pruners as if the trials ran one after the other, in
many random orders, and compares what is left with the exhaustive search.

    python benchmarks/pruning.py record --processes 14      # 27 settings x 5 seeds of the embedded model, on one GPU
    python benchmarks/pruning.py replay
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
from benchmark_report import describe_machine, format_table
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner

from hw3.common.atomic_io import write_atomically, write_json
from hw3.runs.manifest import git_commit, installed_versions

RECIPE = Path("recipes/tiny/qlora.yaml")
KEYS = {
    "training.learning_rate": [5e-4, 2e-3, 8e-3],
    "training.lr_scheduler_type": ["constant", "linear", "cosine"],
    "lora.r": [2, 8, 32],
}
SEEDS = (1, 2, 3, 4, 5)
SCORES = 10  # scored checkpoints of each run
FIXED = (
    "training.save_total_limit=1 data.dev_fraction=0.1 training.report_to=none training.logging_steps=30 "
    "evaluation.during_training=true"
)
# TRL's step: other values of lora.r would need another captured step.
GPU = (
    "speed=plain training.use_cpu=false training.bf16=true model.dtype=bfloat16 "
    "quantization.bnb_4bit_compute_dtype=bfloat16"
)
ORDERS = 200  # random orders of the settings for each seed
PRUNERS: dict[str, Any] = {
    "none": NopPruner,
    **{
        f"{name}, reduction_factor {factor}": (pruner, factor)
        for name, pruner in (("successive halving", SuccessiveHalvingPruner), ("hyperband", HyperbandPruner))
        for factor in (2, 3, 4)
    },
}
COLUMNS = {
    "setting": "pruner",
    "kept_best": "best setting kept",
    "kept_within_interval": "best, or one in its interval",
    "steps_saved": "steps saved",
    "loss": "score lost, median",
    "worst_loss": "at most",
}


def list_settings() -> list[dict[str, Any]]:
    """Return all combinations of the values."""
    return [dict(zip(KEYS, values, strict=True)) for values in itertools.product(*KEYS.values())]


def record(arguments: argparse.Namespace) -> None:
    """Train what is not recorded yet, in several processes, and collect their files into one."""
    parts = arguments.curves.with_suffix("")
    parts.mkdir(parents=True, exist_ok=True)
    if arguments.process is not None:
        _record_part(arguments, parts)
        return
    for run in _read(arguments.curves).get("runs", []):
        write_json(parts / f"{run['setting']}-{run['seed']}.json", run)
    command = [sys.executable, __file__, *sys.argv[1:], "--process"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    processes = [
        subprocess.Popen([*command, str(number)], env=environment, stderr=subprocess.DEVNULL)
        for number in range(arguments.processes)
    ]
    for process in processes:
        process.wait()
    runs = [json.loads(path.read_text()) for path in parts.glob("*.json")]
    report = {
        "machine": describe_machine(),
        "versions": installed_versions(),
        "commit": git_commit(),
        "settings": list_settings(),
        "max_steps": arguments.steps,
        "runs": sorted(runs, key=lambda run: (run["seed"], run["setting"])),
    }
    write_json(arguments.curves, report)
    shutil.rmtree(parts)
    print(f"{len(runs)} of {len(list_settings()) * arguments.seeds} runs recorded")


def _record_part(arguments: argparse.Namespace, parts: Path) -> None:
    """Train this process's share of the runs, with one base model."""
    from hw3.config.recipe import load_recipe
    from hw3.evaluation.during_training import build_checkpoint_scorer
    from hw3.runs.run import Run
    from hw3.search.trials import quiet_trials
    from hw3.training.session import TrainingSession
    from hw3.training.train import train

    deadline = time.monotonic() + arguments.minutes * 60
    session = TrainingSession()
    all_runs = [(seed, number) for seed in SEEDS[: arguments.seeds] for number in range(len(list_settings()))]
    for seed, number in all_runs[arguments.process :: arguments.processes]:
        part = parts / f"{number}-{seed}.json"
        if part.exists():
            continue
        if time.monotonic() > deadline:
            break
        started = time.monotonic()
        values = list_settings()[number] | {"lora.lora_alpha": 2 * list_settings()[number]["lora.r"]}
        overrides = [*FIXED.split(), *([] if arguments.cpu else GPU.split()), f"training.seed={seed}", *arguments.set]
        overrides += [f"training.max_steps={arguments.steps}", f"training.save_steps={arguments.steps // SCORES}"]
        overrides += [f"{key}={value}" for key, value in values.items()]
        run = Run(arguments.scratch / f"{number}-{seed}")
        shutil.rmtree(run.path, ignore_errors=True)
        with quiet_trials():
            recipe = load_recipe(RECIPE, overrides)
            assert train(recipe, run.path, session=session, score_checkpoint=build_checkpoint_scorer(run)) == 0
        (results,) = run.read_results().values()
        entries = [entry for entry in results.entries if entry.step]
        write_json(
            part,
            {
                "setting": number,
                "seed": seed,
                "scores": {str(entry.step): entry.mean_perplexity for entry in entries},
                "ci95": {str(entry.step): entry.mean_perplexity_ci95 for entry in entries},
                "seconds": round(time.monotonic() - started, 2),
            },
        )
        shutil.rmtree(run.path)


def replay(arguments: argparse.Namespace) -> None:
    """Give the recorded scores to each pruner, and write what it keeps and saves."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorded = _read(arguments.curves)
    seeds = sorted({run["seed"] for run in recorded["runs"]})
    rows = []
    for name, pruner in PRUNERS.items():
        outcomes = []
        for seed in seeds:
            runs = [run for run in recorded["runs"] if run["seed"] == seed]
            for order in range(1 if pruner is NopPruner else arguments.orders):
                outcomes.append(_replay_once(runs, pruner, recorded["max_steps"], order))
        count = len(outcomes)
        losses = sorted(outcome["loss"] for outcome in outcomes)
        rows.append(
            {
                "setting": name,
                "searches": count,
                "kept_best": f"{sum(outcome['kept_best'] for outcome in outcomes) / count:.0%}",
                "kept_within_interval": f"{sum(outcome['is_within'] for outcome in outcomes) / count:.0%}",
                "steps_saved": f"{sum(outcome['saved'] for outcome in outcomes) / count:.0%}",
                "loss": f"{losses[count // 2]:.1%}",
                "worst_loss": f"{losses[-1]:.1%}",
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    report = {key: recorded[key] for key in ("machine", "versions", "commit")}
    report |= {"curves": arguments.curves.name, "columns": COLUMNS, "rows": rows}
    write_json(arguments.output / "pruning.json", report)
    write_atomically(arguments.output / "pruning.md", format_table(report))


def make_pruner(pruner: Any, first_score: int, max_steps: int) -> BasePruner:
    """Return Optuna's pruner with the settings that `hw3 search` gives it."""
    if pruner is NopPruner:
        return NopPruner()
    pruner_class, factor = pruner
    limit = {"max_resource": max_steps} if pruner_class is HyperbandPruner else {}
    return pruner_class(min_resource=first_score, reduction_factor=factor, **limit)


def _replay_once(runs: list[dict[str, Any]], pruner: Any, max_steps: int, order: int) -> dict[str, Any]:
    """Search among recorded runs in a random order; return whether the best was kept, and the share of steps saved."""
    first_score = min(int(step) for step in runs[0]["scores"])
    # Hyperband draws a trial's bracket from the study's name and the trial's number.
    study = optuna.create_study(study_name=f"order-{order}", pruner=make_pruner(pruner, first_score, max_steps))
    scores: dict[int, float] = {}
    steps_done = 0
    for run in random.Random(order).sample(runs, len(runs)):
        trial = study.ask()
        for step, score in sorted((int(step), score) for step, score in run["scores"].items()):
            trial.report(score, step)
            last_step = step
            if step < max_steps and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            scores[run["setting"]] = min(run["scores"].values())
            study.tell(trial, scores[run["setting"]])
        steps_done += last_step
    final = {run["setting"]: min(run["scores"].values()) for run in runs}
    best = min(final, key=lambda setting: final[setting])
    found = min(scores, key=lambda setting: scores[setting])
    best_run = next(run for run in runs if run["setting"] == best)
    best_step = min(best_run["scores"], key=lambda step: best_run["scores"][step])
    return {
        "kept_best": found == best,
        "is_within": final[found] <= best_run["ci95"][best_step][1],
        "saved": 1 - steps_done / (max_steps * len(runs)),
        "loss": final[found] / final[best] - 1,
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> int:
    """Record or replay."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=["record", "replay"])
    parser.add_argument("--curves", type=Path, default=Path("docs/search/curves.json"))
    parser.add_argument("--output", type=Path, default=Path("docs/search"))
    parser.add_argument("--scratch", type=Path, default=Path("scratch/pruning"))
    parser.add_argument("--processes", type=int, default=1, help="processes on the GPU")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="record the first N seeds only")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so many minutes")
    parser.add_argument("--orders", type=int, default=ORDERS)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    (record if arguments.command == "record" else replay)(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
