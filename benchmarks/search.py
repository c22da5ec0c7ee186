"""Measure `hw3 search`: the seconds between two trials in one process, and trials per hour on one and on two GPUs.

A trial starts when the one before has ended, and its time to start ends with its first optimizer step. For comparison,
the same run is started in a process of its own, which imports the libraries, loads the base model, dequantizes it, and
compiles and captures the CUDA-graph step.

    python benchmarks/search.py --model gemma --tokenizer DIR      # random weights of Gemma-2-2B's shape
    python benchmarks/search.py --model tiny [--cpu]
    python benchmarks/search.py --model smollm2 --base data/smollm2
    python benchmarks/search.py --model tiny --gpus 2              # trials per hour with one and with two processes
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmark_report import describe_machine, read_previous_rows, write_report
from random_models import make_random_base

TRIALS, TRIALS_PER_GPU = 5, 8
COMPARED_TRIAL = 2  # is trained in a process of its own too
BF16 = "training.use_cpu=false training.bf16=true model.dtype=bfloat16 quantization.bnb_4bit_compute_dtype=bfloat16"
DATA = "data.train=data/train.json data.eval=data/eval.json data.dev_fraction=0.1"
STEPS = "training.max_steps=20 training.save_steps=10 training.report_to=none training.save_total_limit=1"
SPACE = """
trials: {trials}
sampler: random
pruner: none
space:
  training.learning_rate:
    float: {{low: 1e-4, high: 1e-3, log: true}}
  training.weight_decay:
    float: {{low: 0.0, high: 0.1}}
"""
COLUMNS = {
    "setting": "setting",
    "first_trial": "first trial, s",
    "next_trials": "next trials, s (median)",
    "slowest": "slowest, s",
    "other_shapes": "trial with another r, s",
    "new_process": "new process, s",
    "same_adapter": "same adapter as in a new process",
    "trial": "a whole trial, s (median)",
    "trials_per_hour": "trials per hour",
    "trials_per_hour_later": "trials per hour, after the first of each process",
}
# What a trial does, in this order: module, class if it is a method, and function.
STAGES = {
    "read and check the recipe, plan": ("hw3.training.train", "", "plan_run"),
    "collect garbage": ("hw3.training.session", "TrainingSession", "take_base"),
    "copy the modules for scoring": ("hw3.training.train", "", "build_scoring_slot"),
    "build the trainer, with its adapters": ("hw3.training.train", "", "build_trainer"),
    "check the captured step": ("hw3.training.train", "", "_capture_cuda_graph_step"),
    "write recipe, manifest and tokenizer": ("hw3.training.train", "", "_write_run_files"),
    "the training loop": ("hw3.training.trainer", "CompletionTrainer", "train"),
    "  of which scoring": ("hw3.evaluation.during_training", "_DuringTrainingScorer", "__call__"),
    "restore the base model": ("hw3.training.session", "TrainingSession", "restore"),
}


def start_clock(first_steps: list[float]) -> None:
    """Record the time at the end of the first optimizer step of every run of this process."""
    import torch

    from hw3.training.trainer import CompletionTrainer

    training_step = CompletionTrainer.training_step

    def timed_step(self: CompletionTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = training_step(self, *args, **kwargs)
        if not getattr(self, "_has_been_timed", False):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._has_been_timed = True
            first_steps.append(time.time())
        return loss

    CompletionTrainer.training_step = timed_step


def time_stages() -> list[tuple[str, float]]:
    """Record the seconds of each call of the functions in `STAGES`, in the list that is returned."""
    calls: list[tuple[str, float]] = []

    def timed(stage: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                calls.append((stage, time.time() - started))

        return call

    for stage, (module, owner, name) in STAGES.items():
        place: Any = importlib.import_module(module)
        place = getattr(place, owner) if owner else place
        setattr(place, name, timed(stage, getattr(place, name)))
    return calls


def measure_one_process(recipe: Path, overrides: list[str], scratch: Path) -> dict[str, Any]:
    """Train trials one after the other in this process; return the seconds until the first step of each."""
    first_steps: list[float] = []
    started = [time.time()]
    start_clock(first_steps)
    calls = time_stages()

    from hw3.search.search import open_study
    from hw3.search.space import load_space
    from hw3.search.trial_recipe import TrialRecipes
    from hw3.search.trials import TrialRunner

    folder = scratch / "one-process"
    recipes = TrialRecipes(recipe, load_space(write_space(scratch, TRIALS)), overrides)
    runner = TrialRunner(recipes, folder)
    search = open_study(recipes, folder, None)
    calls_by_trial: list[list[tuple[str, float]]] = []
    while (taken := search.take_trial()) is not None:
        trial, lock = taken
        assert runner.run(search, trial) == 0
        lock.release()
        started.append(time.time())
        # Of the first trial, and before it, only its seconds to the first step are reported.
        calls_by_trial.append(calls.copy())
        print(f"trial {trial.number}: first step after {first_steps[-1] - started[-2]:.2f} s", calls, flush=True)
        calls.clear()
    assert len(first_steps) == TRIALS, [trial.user_attrs for trial in search.trials()]
    trial_seconds = [end - start for start, end in pairwise(started[1:])]
    # Other shapes: the base model stays, and the step is captured again.
    other = TrialRunner(TrialRecipes(recipe, recipes.space, [*overrides, "lora.r=8"]), scratch / "other-shapes")
    other._session = runner._session
    other_search = open_study(other._recipes, scratch / "other-shapes", None)
    trial, lock = other_search.take_trial()
    started[-1] = time.time()
    assert other.run(other_search, trial) == 0
    lock.release()
    settings = recipes.space.decode(search.trials()[COMPARED_TRIAL].params)
    (scratch / "overrides.json").write_text(json.dumps(recipes.all_overrides(settings)))
    seconds = [end - start for start, end in zip(started, first_steps, strict=False)]
    return {
        "first_trial": round(seconds[0], 1),
        "next_trials": round(statistics.median(seconds[1:TRIALS]), 2),
        "slowest": round(max(seconds[1:TRIALS]), 2),
        "seconds": [round(second, 2) for second in seconds[:TRIALS]],
        "other_shapes": round(seconds[TRIALS], 1),
        "trial": round(statistics.median(trial_seconds), 1),
        "stages": {stage: _median_sum(calls_by_trial[1:], stage) for stage in STAGES},
    }


def _median_sum(calls_by_trial: list[list[tuple[str, float]]], stage: str) -> float:
    """Return the seconds of a stage: the median over trials of the sum over its calls."""
    sums = [sum(seconds for name, seconds in calls if name == stage) for calls in calls_by_trial]
    return round(statistics.median(sums), 3)


def run_single(recipe: Path, run: Path) -> None:
    """Print the seconds from the start of this process, given in the environment, to the first optimizer step."""
    overrides = json.loads((run.parent / "overrides.json").read_text())
    first_steps: list[float] = []
    start_clock(first_steps)

    from hw3.config.recipe import load_recipe
    from hw3.training.train import train

    assert train(load_recipe(recipe, overrides), run) == 0
    print(json.dumps({"seconds": first_steps[0] - float(os.environ["STARTED"])}))


def measure_new_process(scratch: Path) -> dict[str, Any]:
    """Train a trial in a new process; return the seconds to its first step, and whether the adapters are equal."""
    command = [sys.executable, __file__, *sys.argv[1:], "--single", str(scratch / "single")]
    environment = os.environ | {"STARTED": str(time.time())}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    if completed.returncode:
        raise SystemExit(completed.stderr[-3000:])
    seconds = json.loads(completed.stdout.splitlines()[-1])["seconds"]
    trial = scratch / "one-process" / f"trial-{COMPARED_TRIAL:03}"
    files = [max(run.glob("checkpoint-*/adapter_model.safetensors")) for run in (trial, scratch / "single")]
    is_equal = files[0].read_bytes() == files[1].read_bytes()
    return {"new_process": round(seconds, 1), "same_adapter": "bitwise" if is_equal else "no"}


def measure_gpus(recipe: Path, overrides: list[str], scratch: Path, gpus: int) -> dict[str, Any]:
    """Search with one process per GPU; return trials per hour, starting included."""
    folder, trials = scratch / f"gpus-{gpus}", TRIALS_PER_GPU * gpus
    space = write_space(scratch, trials)
    command = [sys.executable, "-m", "hw3", "search", str(recipe), str(space), *overrides]
    command += ["--output", str(folder), "--workers", str(gpus)]
    started = time.monotonic()
    completed = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if completed.returncode:
        raise SystemExit(completed.stderr[-3000:])
    ended = sorted(trial.datetime_complete for trial in _read_trials(folder))
    # All processes have started when as many trials have ended.
    later = (ended[-1] - ended[gpus - 1]).total_seconds()
    return {
        "trials": trials,
        "seconds": round(seconds, 1),
        "trials_per_hour": round(3600 * trials / seconds),
        "trials_per_hour_later": round(3600 * (trials - gpus) / later),
    }


def _read_trials(folder: Path) -> list[Any]:
    import optuna

    from hw3.search.storage import open_storage

    storage = open_storage(None, folder)
    return optuna.load_study(study_name=None, storage=storage).get_trials()


def write_space(scratch: Path, trials: int) -> Path:
    """Write a space that needs one captured step; return its path."""
    path = scratch / f"space-{trials}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SPACE.format(trials=trials))
    return path


def main() -> int:
    """Measure one model and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", choices=["tiny", "gemma", "smollm2"], default="tiny")
    parser.add_argument("--tokenizer", type=Path, help="Gemma's tokenizer, a folder that AutoTokenizer reads")
    parser.add_argument("--base", type=Path, help="the base model's folder, if it is not that of the recipe")
    parser.add_argument("--gpus", type=int, default=0, help="measure trials per hour on one GPU, and on so many")
    parser.add_argument("--cpu", action="store_true", help="trials of two steps on the CPU")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/search"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--single", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scratch = arguments.scratch / arguments.model
    recipe = Path("recipes") / arguments.model / "qlora.yaml"
    overrides = [*DATA.split(), *STEPS.split()]
    if arguments.model == "gemma":
        base = arguments.scratch / "gemma-2-2b-random"
        make_random_base(base, arguments.tokenizer)
        overrides.append(f"model.pretrained_model_name_or_path={base}")
    if arguments.base is not None:
        overrides.append(f"model.pretrained_model_name_or_path={arguments.base}")
    if arguments.model == "tiny" and not arguments.cpu:
        overrides += BF16.split()
    if arguments.cpu:
        overrides += ["training.max_steps=2", "training.save_steps=2"]
    if arguments.single is not None:
        run_single(recipe, arguments.single)
        return 0
    shutil.rmtree(scratch, ignore_errors=True)
    name = "search_cpu" if arguments.cpu else "search"
    rows = read_previous_rows(arguments.output, name)
    if arguments.gpus:
        for gpus in dict.fromkeys([1, arguments.gpus]):
            setting = f"{arguments.model}, {gpus} GPU{'s' if gpus > 1 else ''}"
            rows[setting] = {"setting": setting, **measure_gpus(recipe, overrides, scratch, gpus)}
            print(json.dumps(rows[setting]), flush=True)
            write_report(arguments.output, name, describe_machine(), list(rows.values()), COLUMNS)
    else:
        setting = f"{arguments.model}, one process"
        row = {"setting": setting, **measure_one_process(recipe, overrides, scratch)}
        print(json.dumps(row), flush=True)
        rows[setting] = row | measure_new_process(scratch)
        print(json.dumps(rows[setting]), flush=True)
    write_report(arguments.output, name, describe_machine(), list(rows.values()), COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
