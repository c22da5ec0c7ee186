"""Scoring and prediction by one process and by several: the same figures, and how many times as fast.

On GPUs, random weights of Gemma-2-2B's shape with 35 checkpoints, as `evaluation.py`; `hw3 eval` of all, and `hw3
predict` of many rows, answers cut at 64 tokens since random weights end none. With `--run`, a run that is there, on the
CPU too, one thread a process. Timed is what processes share out, from the loaded base to the last entry or answer; each
starts Python and reads the base besides.

    python benchmarks/shared_out.py --tokenizer DIR --data FILE --predict FILE [--processes 1 2]
    python benchmarks/shared_out.py --run outputs/tiny-qlora --predict data/train.json --repeats 3
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
from evaluation import CHECKPOINTS, make_run
from launching import launch, sweep
from report import kept_rows, machine, write_report

NEW_TOKENS = 64


def score(run: Path, processes: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`hw3 eval` of everything; returns one row of the report, and the entries."""
    report = sweep(run, run.with_name(f"eval-{processes}.json"), processes=processes, **options())
    seconds = report["shared"]
    (results,) = (run / "eval").glob("*/results.json")
    entries = json.loads(results.read_text())["entries"]
    return {
        "setting": f"hw3 eval, base and {len(entries) - 1} checkpoints",
        "processes": processes,
        "seconds": round(seconds, 2),
        "seconds_whole": round(report["over"] - report["began"], 1),
        "rate": f"{len(entries) / seconds:.2f} entries/s",
    }, entries


def predict(run: Path, words: list[str], processes: int) -> dict[str, Any]:
    """`hw3 predict`; returns one row of the report."""
    shutil.rmtree(run / "predictions", ignore_errors=True)
    words = ["-m", "hw3", "predict", str(run), "--checkpoint", "last", *words]
    began = time.time()
    launch(words, run.with_name(f"predict-{processes}.log"), processes=processes, **options())
    whole = time.time() - began
    (record,) = (run / "predictions").glob("*/*.quality.json")
    found = json.loads(record.read_text())
    return {
        "setting": f"hw3 predict, {found['data']['rows']} rows",
        "processes": processes,
        "seconds": found["seconds"],
        "seconds_whole": round(whole, 1),
        "rate": f"{found['rows_per_second']:.0f} rows/s",
    }


def options() -> dict[str, Any]:
    """How processes are started here."""
    if torch.cuda.is_available():
        return {}
    return {"accelerate": "cpu2", "environment": {"OMP_NUM_THREADS": "1"}}


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several tries the one that took the middle time, with all times."""
    rows = sorted(rows, key=lambda row: row["seconds"])
    return rows[len(rows) // 2] | {"seconds_all": [row["seconds"] for row in rows]}


def furthest(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest relative difference of two sweeps' figures, entry by entry."""
    names = ("mean_perplexity", "token_perplexity", "bits_per_character")
    pairs = zip(one, other, strict=True)
    return max(abs(a[name] / b[name] - 1) for (a, b), name in itertools.product(pairs, names))


def main() -> int:
    """Measure with each number of GPUs and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path, help="rows to score")
    parser.add_argument(
        "--predict", type=Path, required=True, help="rows to answer; with random weights the first of them"
    )
    parser.add_argument("--rows", type=int, default=10_000, help="how many those are")
    parser.add_argument("--run", type=Path, help="a run that is there, instead of tokenizer and data")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("eval", "predict"), help="the other's rows stay as they are")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    run = arguments.scratch / "shared_out"
    shutil.rmtree(run, ignore_errors=True)
    if arguments.run:
        shutil.copytree(arguments.run, run)
        words = [str(arguments.predict)]
    else:
        words = random_run(run, arguments)
    sweeps: list[list[dict[str, Any]]] = []
    tries: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(arguments.repeats):
        for processes in arguments.processes:
            found = []
            if arguments.only != "predict":
                scored, entries = score(run, processes)
                sweeps.append(entries)
                found.append(scored)
            if arguments.only != "eval":
                found.append(predict(run, words, processes))
            for row in found:
                tries.setdefault((row["setting"], processes), []).append(row)
    name = "shared_out" if torch.cuda.is_available() else "shared_out_cpu"
    rows = kept_rows(arguments.out, name, "processes")
    for key, found in tries.items():
        rows[key] = median(found)
        if "eval" in key[0]:
            rows[key]["furthest_apart"] = max(furthest(entries, sweeps[0]) for entries in sweeps)
    for (setting, _), row in rows.items():
        if (setting, 1) in rows:
            row["speedup"] = round(rows[setting, 1]["seconds"] / row["seconds"], 2)
    write_report(arguments.out, name, machine(), list(rows.values()), COLUMNS)
    print(json.dumps(list(rows.values()), indent=2))
    return 0


def random_run(run: Path, arguments: argparse.Namespace) -> list[str]:
    """A run with random checkpoints; returns the words that `hw3 predict` takes for it."""
    data = {"eval": arguments.data, "train": arguments.predict}
    make_run(run, arguments.tokenizer, data, 1 if arguments.only == "predict" else CHECKPOINTS)
    some = arguments.scratch / "rows.json"
    rows = json.loads(arguments.predict.read_text(encoding="utf-8"))[: arguments.rows]
    some.write_text(json.dumps(rows, ensure_ascii=False))
    return [str(some), f"generation.max_new_tokens={NEW_TOKENS}"]


COLUMNS = {
    "setting": "setting",
    "processes": "processes",
    "seconds": "s, shared out",
    "speedup": "times one process",
    "seconds_whole": "s, whole process",
    "rate": "rate",
    "furthest_apart": "figures, furthest apart",
}


if __name__ == "__main__":
    sys.exit(main())
