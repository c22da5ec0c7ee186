"""Scoring and prediction on one GPU and on several: the same figures, and how many times as fast.

Random weights of Gemma-2-2B's shape with 35 checkpoints, as `evaluation.py`; `hw3 eval` of all, and `hw3 predict` of
many rows, answers cut at 64 tokens since random weights end none. Timed is what processes share out, from the loaded
base to the last entry or answer; each starts Python and reads the base besides.

    python benchmarks/shared_out.py --tokenizer DIR --data FILE --predict FILE [--gpus 1 2]
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

from bases import make_base
from evaluation import make_checkpoints, release
from gpu_recipe import RECIPE
from launching import launch
from report import machine, write_report

from hw3.files import write_atomically
from hw3.recipe import load_recipe

ROWS, NEW_TOKENS = 4000, 64


def score(run: Path, gpus: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`hw3 eval` of everything; returns one row of the report, and the entries."""
    shutil.rmtree(run / "eval", ignore_errors=True)
    parts, began = run.with_name("parts.json"), time.time()
    words = [str(Path(__file__).with_name("sweep.py")), str(run), str(parts), str(began)]
    launch(words, run.with_name(f"eval-{gpus}.log"), processes=gpus)
    whole = time.time() - began
    seconds = json.loads(parts.read_text())["shared"]
    (results,) = (run / "eval").glob("*/results.json")
    entries = json.loads(results.read_text())["entries"]
    return {
        "setting": f"hw3 eval, base and {len(entries) - 1} checkpoints",
        "gpus": gpus,
        "seconds": round(seconds, 2),
        "seconds_whole": round(whole, 1),
        "rate": f"{len(entries) / seconds:.2f} entries/s",
    }, entries


def predict(run: Path, rows: Path, gpus: int) -> dict[str, Any]:
    """`hw3 predict` of many rows; returns one row of the report."""
    shutil.rmtree(run / "predictions", ignore_errors=True)
    words = ["-m", "hw3", "predict", str(run), str(rows), "--checkpoint", "last"]
    began = time.time()
    launch([*words, f"generation.max_new_tokens={NEW_TOKENS}"], run.with_name(f"predict-{gpus}.log"), processes=gpus)
    whole = time.time() - began
    (record,) = (run / "predictions").glob("*/*.quality.json")
    found = json.loads(record.read_text())
    return {
        "setting": f"hw3 predict, {ROWS} rows",
        "gpus": gpus,
        "seconds": found["seconds"],
        "seconds_whole": round(whole, 1),
        "rate": f"{found['rows_per_second']:.0f} rows/s",
    }


def furthest(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest relative difference of two sweeps' figures, entry by entry."""
    names = ("mean_perplexity", "token_perplexity", "bits_per_character")
    pairs = zip(one, other, strict=True)
    return max(abs(a[name] / b[name] - 1) for (a, b), name in itertools.product(pairs, names))


def main() -> int:
    """Measure with each number of GPUs and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="rows to score")
    parser.add_argument("--predict", type=Path, required=True, help="rows to answer; the first 4,000 are")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    base, run = arguments.scratch / "gemma-2-2b-random", arguments.scratch / "shared_out"
    make_base(base, arguments.tokenizer)
    recipe = load_recipe(
        Path(RECIPE),
        [
            f"model.pretrained_model_name_or_path={base}",
            f"data.eval={arguments.data}",
            f"data.train={arguments.predict}",
        ],
    )
    write_atomically(run / "recipe.yaml", recipe.to_yaml())
    make_checkpoints(recipe, run)
    release()
    some = arguments.scratch / "rows.json"
    some.write_text(json.dumps(json.loads(arguments.predict.read_text(encoding="utf-8"))[:ROWS], ensure_ascii=False))
    rows: list[dict[str, Any]] = []
    sweeps = []
    for gpus in arguments.gpus:
        scored, entries = score(run, gpus)
        sweeps.append(entries)
        scored["furthest_from_one_gpu"] = furthest(entries, sweeps[0])
        for row in (scored, predict(run, some, gpus)):
            first = next((other for other in rows if other["setting"] == row["setting"]), row)
            rows.append(row | {"speedup": round(first["seconds"] / row["seconds"], 2)})
            print(json.dumps(rows[-1]), flush=True)
            write_report(arguments.out, "shared_out", machine(), rows, COLUMNS)
    return 0


COLUMNS = {
    "setting": "setting",
    "gpus": "GPUs",
    "seconds": "s, shared out",
    "speedup": "times one GPU",
    "seconds_whole": "s, whole process",
    "rate": "rate",
    "furthest_from_one_gpu": "furthest from one GPU",
}


if __name__ == "__main__":
    sys.exit(main())
