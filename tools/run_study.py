"""Run the study of docs/study/plan.yaml in parts that fit ten minutes, and resume it.

    python tools/run_study.py                    # print what the study costs, then run the next part
    python tools/run_study.py --minutes 0        # print the cost only
    python tools/run_study.py --workers 12       # as many processes at once, on all GPUs of the machine

Each finished run is a file in OUTPUT/runs, which is not computed again. Without a GPU, runs are trained on the CPU; a
run that takes longer than a part is not interrupted. At the end of each part, all finished runs are written to
OUTPUT/runs.json, from which `tools/draw_study.py` draws the pictures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from study.plan import (
    PLAN_FILE,
    RECORDS_FILE,
    StudyModel,
    StudyPlan,
    StudyRun,
    divide_into_tasks,
    held_out_file,
    read_plan,
    write_data,
)

from hw3.config.recipe import load_recipe
from hw3.modeling.devices import visible_gpus

OUTPUT = Path("outputs/study")
# A process that has imported and captured before its first run; docs/benchmarks/train_step.json measures 25 s and more.
START_SECONDS = 45

# Of every checkpoint, in the study's records.
KEPT_SCORES = ("mean_perplexity", "token_perplexity", "eval_loss")

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the study; both times are those of `time.time`.

    Attributes:
        start: when it started.
        end: start no run that would end later.
    """

    start: float
    end: float

    def has_time(self, seconds: float) -> bool:
        """Return whether a run that takes so long may start now.

        A run that is longer than the whole part would never start; the first half of a part may start it.
        """
        now, length = time.time(), self.end - self.start
        return now + seconds <= self.end or (seconds > length and now < self.start + length / 2)


def main() -> int:
    """Print the cost, run a part, and write what is finished."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--plan", type=Path, default=PLAN_FILE)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where finished runs and data files are kept")
    parser.add_argument("--keep", type=Path, help="folder of runs.json and rows.npz, by default that of --output")
    parser.add_argument("--minutes", type=float, default=9.5, help="start no run that would end later")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models or experiments to run")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides of all recipes")
    arguments = parser.parse_args()
    start = time.time()
    part = Part(start, start + 60 * arguments.minutes)
    plan = read_plan(arguments.plan)
    gpus = visible_gpus()
    write_data(arguments.output / "data", plan)
    print(describe_cost(plan, arguments.output, bool(gpus)), flush=True)
    for model in plan.models.values():
        if reason := why_skipped(model, arguments.output):
            print(f"{model.name}: skipped, because {reason}")
    if arguments.minutes > 0:
        tasks = list_tasks(plan, arguments.output, arguments.only)
        run_tasks(tasks, arguments.output, part, arguments.workers, gpus, arguments.set)
        folder = arguments.keep or arguments.output
        count = collect(plan, arguments.output, folder)
        if list_tasks(plan, arguments.output, arguments.only):
            print(f"{count} of {len(plan.runs)} runs are finished; run the same command for the next part")
        else:
            print(f"{count} runs are finished. Next: python tools/draw_study.py --folder {folder}")
    return 0


def why_skipped(model: StudyModel, output: Path) -> str | None:
    """Return why a model's runs cannot be trained here; None if they can."""
    if not held_out_file(output / "data", model).is_file():
        return f"{load_recipe(model.recipe).data.train} is missing"
    if model.base is not None and not Path(model.base).is_dir():
        return f"{model.base} is missing"
    return None


# --- cost -----------------------------------------------------------------------------------------------------------


def describe_cost(plan: StudyPlan, output: Path, on_gpu: bool) -> str:
    """Return a table of the experiments: runs, finished runs, steps, and estimated minutes of one process.

    If no run of a model has finished on this kind of device, the estimate is of the other kind.
    """
    seconds = {name: seconds_per_step(name, output, on_gpu) for name in plan.models}
    unknown = [name for name, cost in seconds.items() if cost is None]
    seconds |= {name: seconds_per_step(name, output, not on_gpu) for name in unknown}
    experiments: dict[tuple[str, str], list[StudyRun]] = {}
    for run in plan.runs:
        experiments.setdefault((run.model.name, run.experiments[0]), []).append(run)
    lines = [f"{'model':<9}{'experiment':<15}{'runs':>5}{'finished':>9}{'steps':>9}{'minutes':>9}"]
    total = 0.0
    for (model, experiment), runs in experiments.items():
        missing = [run for run in runs if not record_file(output, run).exists()]
        step_seconds = seconds[model]
        minutes = None if step_seconds is None else sum(run.steps for run in missing) * step_seconds / 60
        total += minutes or 0.0
        cost = "unknown" if minutes is None else f"{minutes:.1f}"
        all_steps = sum(run.steps for run in runs)
        finished = len(runs) - len(missing)
        lines.append(f"{model:<9}{experiment:<15}{len(runs):>5}{finished:>9}{all_steps:>9,}{cost:>9}")
    lines.append(f"about {total:.0f} minutes of one process are left; several processes share a GPU well")
    if unknown:
        here, elsewhere = ("a GPU", "a CPU") if on_gpu else ("a CPU", "a GPU")
        names = " and ".join(unknown)
        lines.append(f"no run of {names} has finished on {here}: minutes are those on {elsewhere}, where known")
    return "\n".join(lines)


def seconds_per_step(model: str, output: Path, on_gpu: bool) -> float | None:
    """Return the median seconds per step of a model's finished runs, scoring included, on the same kind of device.

    None if there are none, neither here nor in the study's records.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (output / "runs").glob(f"{model}-*.json")]
    if RECORDS_FILE.exists():
        records += [
            record
            for record in json.loads(RECORDS_FILE.read_text(encoding="utf-8"))["runs"]
            if record["model"] == model
        ]
    costs = [sum(record["seconds"].values()) / record["steps"] for record in records if is_on_gpu(record) == on_gpu]
    return statistics.median(costs) if costs else None


def is_on_gpu(record: Record) -> bool:
    """Return whether a run was trained on a GPU."""
    return record["device"] != "CPU"


# --- runs -----------------------------------------------------------------------------------------------------------


def record_file(output: Path, run: StudyRun) -> Path:
    """Return the path of a run's record."""
    return output / "runs" / f"{run.id}.json"


def list_tasks(plan: StudyPlan, output: Path, only: list[str]) -> list[list[StudyRun]]:
    """Return the missing runs whose data files are there, in tasks for processes, the most important first."""
    return divide_into_tasks(
        run
        for run in plan.runs
        if not record_file(output, run).exists()
        and (not only or run.model.name in only or set(only) & set(run.experiments))
        and why_skipped(run.model, output) is None
    )


def run_tasks(
    tasks: list[list[StudyRun]], output: Path, part: Part, workers: int, gpus: list[str], extra: list[str]
) -> None:
    """Run the tasks in several processes until the part ends; report each finished task."""
    (output / "runs").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    numbers = context.Value("i", 0)
    with ProcessPoolExecutor(workers, context, initializer=_use_one_gpu, initargs=(numbers, gpus)) as pool:
        futures = [pool.submit(run_task, task, output, part, bool(gpus), extra) for task in tasks]
        for future in as_completed(futures):
            print(future.result(), flush=True)


def _use_one_gpu(numbers: Any, gpus: list[str]) -> None:
    """Give each worker one of the GPUs in turn, before it initializes CUDA."""
    if gpus:
        with numbers.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[numbers.value % len(gpus)]
            numbers.value += 1


def run_task(task: list[StudyRun], output: Path, part: Part, on_gpu: bool, extra: list[str]) -> str:
    """Train and score the runs of one group, as long as there is time; return a line for the user."""
    if not part.has_time(START_SECONDS):
        return f"{task[0].id}: no time left for it and {len(task) - 1} more"
    import numpy as np
    from study.session import Session

    from hw3.common.atomic_io import write_json

    started, done = time.time(), 0
    step_seconds = seconds_per_step(task[0].model.name, output, on_gpu) or 0.0
    try:
        session = Session(task[0], output / "data", on_gpu=on_gpu, extra=extra)
        for run in task:
            began = time.time()
            if not part.has_time(step_seconds * run.steps):
                break
            record, row_perplexities = session.train(run)
            arrays = {name: np.array(values, dtype=np.float32) for name, values in row_perplexities.items()}
            np.savez_compressed(output / "runs" / f"{run.id}.npz", **arrays)
            write_json(record_file(output, run), record)
            done += 1
            step_seconds = (time.time() - began) / record["steps"]
    except Exception:
        return f"{task[0].group}: failed after {done} runs\n{traceback.format_exc()}"
    return f"{task[0].group}: {done} of {len(task)} runs in {time.time() - started:.0f} s"


# --- results --------------------------------------------------------------------------------------------------------


def collect(plan: StudyPlan, output: Path, folder: Path) -> int:
    """Write all finished runs of the plan to `runs.json`, and the row perplexities of their best checkpoints.

    `rows.npz` has these: an array for each run and data file, in float16, in the order of the file. `runs.json` has the
    intervals and the scores by direction of the best checkpoints only.

    Returns:
        The number of finished runs.
    """
    import numpy as np

    from hw3.common.atomic_io import write_atomically

    records, arrays = [], {}
    for run in plan.runs:
        if (path := record_file(output, run)).exists():
            # Experiments may have been renamed since.
            record = {**json.loads(path.read_text(encoding="utf-8")), "experiments": run.experiments}
            best = [point["step"] for point in record["curve"]].index(record["best_step"])
            with np.load(path.with_suffix(".npz")) as saved:
                arrays |= {f"{run.id}/{name}": saved[name][best].astype(np.float16) for name in saved.files}
            for point in record["curve"][:best] + record["curve"][best + 1 :]:
                for file in saved.files:
                    point[file] = {key: point[file][key] for key in KEPT_SCORES if key in point[file]}
            records.append(record)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    write_atomically(folder / "runs.json", f'{{"plan": "{plan.path}", "runs": [\n{lines}\n]}}\n')
    np.savez_compressed(folder / "rows.npz", **arrays)
    return len(records)


if __name__ == "__main__":
    sys.exit(main())
