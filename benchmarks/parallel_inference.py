"""Compare scoring and prediction by several processes with one: the same scores, and the speedup.

On GPUs, `hw3 eval` scores 35 checkpoints on random weights of Gemma-2-2B's shape, as in `evaluation.py`, and `hw3
predict` translates many rows. Outputs end after 64 tokens, since random weights do not end them. With `--run`, an
existing run is used, on a CPU too, with one thread per process. The time is that of the distributed part, from the
loaded base model to the last entry or output; in addition, each process starts Python and reads the base model.

    python benchmarks/parallel_inference.py --tokenizer DIR --data FILE --predict FILE [--processes 1 2]
    python benchmarks/parallel_inference.py --run outputs/tiny-qlora --predict data/train.json --repeats 3
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_report import describe_machine, read_previous_rows, write_report
from evaluation import CHECKPOINTS, make_random_run
from launching import launch, sweep

NEW_TOKENS = 64
COLUMNS = {
    "setting": "setting",
    "processes": "processes",
    "seconds": "s, distributed part",
    "speedup": "speedup",
    "seconds_total": "s, complete process",
    "rate": "rate",
    "largest_relative_difference": "largest relative difference",
}


def score(run: Path, processes: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run `hw3 eval` on all checkpoints; return one row of the report, and the entries."""
    report = sweep(run, run.with_name(f"eval-{processes}.json"), processes=processes, **launch_options())
    seconds = report["distributed"]
    (results,) = (run / "eval").glob("*/results.json")
    entries = json.loads(results.read_text(encoding="utf-8"))["entries"]
    return {
        "setting": f"hw3 eval, base model and {len(entries) - 1} checkpoints",
        "processes": processes,
        "seconds": round(seconds, 2),
        "seconds_total": round(report["finished"] - report["started"], 1),
        "rate": f"{len(entries) / seconds:.2f} entries/s",
    }, entries


def predict(run: Path, arguments: list[str], processes: int) -> dict[str, Any]:
    """Run `hw3 predict`; return one row of the report."""
    shutil.rmtree(run / "predictions", ignore_errors=True)
    command = ["-m", "hw3", "predict", str(run), "--checkpoint", "last", *arguments]
    started = time.time()
    launch(command, run.with_name(f"predict-{processes}.log"), processes=processes, **launch_options())
    seconds_total = time.time() - started
    (file,) = (run / "predictions").glob("*/*.quality.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    return {
        "setting": f"hw3 predict, {record['data']['rows']} rows",
        "processes": processes,
        "seconds": record["seconds"],
        "seconds_total": round(seconds_total, 1),
        "rate": f"{record['rows_per_second']:.0f} rows/s",
    }


def launch_options() -> dict[str, Any]:
    """Return the options of `launch` for this machine."""
    if torch.cuda.is_available():
        return {}
    return {"accelerate": "cpu2", "environment": {"OMP_NUM_THREADS": "1"}}


def select_median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the repetition with the median time, with the times of all repetitions."""
    rows = sorted(rows, key=lambda row: row["seconds"])
    return rows[len(rows) // 2] | {"seconds_all": [row["seconds"] for row in rows]}


def largest_difference(entries: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Return the largest relative difference between the scores of two sweeps."""
    names = ("mean_perplexity", "token_perplexity", "bits_per_character")
    pairs = zip(entries, reference, strict=True)
    return max(abs(a[name] / b[name] - 1) for (a, b), name in itertools.product(pairs, names))


def measure(run: Path, arguments: argparse.Namespace, predict_arguments: list[str]) -> dict[Any, dict[str, Any]]:
    """Measure each number of processes, `--repeats` times; return rows by (setting, processes)."""
    sweeps: list[list[dict[str, Any]]] = []
    repetitions: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _, processes in itertools.product(range(arguments.repeats), arguments.processes):
        measured = []
        if arguments.only != "predict":
            row, entries = score(run, processes)
            sweeps.append(entries)
            measured.append(row)
        if arguments.only != "eval":
            measured.append(predict(run, predict_arguments, processes))
        for row in measured:
            repetitions.setdefault((row["setting"], processes), []).append(row)
    rows = {key: select_median(repeated) for key, repeated in repetitions.items()}
    for (setting, _), row in rows.items():
        if "eval" in setting:
            row["largest_relative_difference"] = max(largest_difference(entries, sweeps[0]) for entries in sweeps)
    return rows


def main() -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path, help="rows to score")
    parser.add_argument("--predict", type=Path, required=True, help="rows to translate")
    parser.add_argument(
        "--rows", type=int, default=10_000, help="with random weights: how many of the rows to translate"
    )
    parser.add_argument("--run", type=Path, help="an existing run, instead of --tokenizer and --data")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("eval", "predict"), help="measure one; keep the other's rows")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    run = arguments.scratch / "parallel_inference"
    shutil.rmtree(run, ignore_errors=True)
    if arguments.run:
        shutil.copytree(arguments.run, run)
        predict_arguments = [str(arguments.predict)]
    else:
        predict_arguments = prepare_random_run(run, arguments)
    name = "parallel_inference" if torch.cuda.is_available() else "parallel_inference_cpu"
    rows = read_previous_rows(arguments.output, name, "processes")
    rows |= measure(run, arguments, predict_arguments)
    for (setting, _), row in rows.items():
        if (setting, 1) in rows:
            row["speedup"] = round(rows[setting, 1]["seconds"] / row["seconds"], 2)
    write_report(arguments.output, name, describe_machine(), list(rows.values()), COLUMNS)
    print(json.dumps(list(rows.values()), indent=2))
    return 0


def prepare_random_run(run: Path, arguments: argparse.Namespace) -> list[str]:
    """Make a run with random checkpoints; return the arguments of `hw3 predict` for it."""
    data = {"eval": arguments.data, "train": arguments.predict}
    make_random_run(run, arguments.tokenizer, data, 1 if arguments.only == "predict" else CHECKPOINTS)
    selected = arguments.scratch / "rows.json"
    rows = json.loads(arguments.predict.read_text(encoding="utf-8"))[: arguments.rows]
    selected.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return [str(selected), f"generation.max_new_tokens={NEW_TOKENS}"]


if __name__ == "__main__":
    sys.exit(main())
