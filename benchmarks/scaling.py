"""Rows a second on 1, 2 and 4 GPUs of one machine, by the launcher and the accelerate file that users have.

At fixed rows per device (8 each) and at fixed rows per step (8 in all), the recipe as it is: `speed: auto`.

    python benchmarks/scaling.py --tokenizer DIR --data FILE [--gpus 1 2 4]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bases import make_base
from gpu_recipe import RECIPE
from launching import figures, train
from report import kept_rows, machine, write_report

STEPS, LOGGED = 100, 10


def measure(gpus: int, rows_per_step: int, given: list[str], run: Path) -> dict[str, Any]:
    """One run through `accelerate launch`; returns one row of the report."""
    overrides = [
        *given,
        "training.per_device_train_batch_size=4",
        f"training.gradient_accumulation_steps={rows_per_step // 4}",
        f"training.max_steps={STEPS}",
        f"training.save_steps={STEPS}",
        f"training.logging_steps={LOGGED}",
        "training.report_to=none",
    ]
    train(RECIPE, overrides, run, processes=gpus)
    found = figures(run, warm_up=2)
    return {
        "setting": f"{gpus} GPU{'s' if gpus > 1 else ''}, {rows_per_step} rows a step",
        "gpus": gpus,
        "rows_per_step": rows_per_step,
        "rows_per_second": round(rows_per_step / found["seconds_per_step"], 1),
        **found,
    }


def main() -> int:
    """Measure each number of GPUs and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--fixed-step", type=int, nargs="*", default=[2, 4], help="numbers that share 8 rows")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--go-on", action="store_true", help="add to the report that is there, of the same machine")
    arguments = parser.parse_args()
    most = max(arguments.gpus + arguments.fixed_step)
    if most > torch.cuda.device_count():
        raise SystemExit(f"--gpus: {most} are more than the {torch.cuda.device_count()} there are")
    base = arguments.scratch / "gemma-2-2b-random"
    make_base(base, arguments.tokenizer)
    given = [f"model.pretrained_model_name_or_path={base}", f"data.train={arguments.data}", "data.eval=data/eval.json"]
    rows = kept_rows(arguments.out, "scaling") if arguments.go_on else {}
    for gpus, rows_per_step in [*((n, 8 * n) for n in arguments.gpus), *((n, 8) for n in arguments.fixed_step)]:
        row = measure(gpus, rows_per_step, given, arguments.scratch / "scaling")
        rows[row["setting"]] = row
        one = next((row for row in rows.values() if row["gpus"] == 1), None)
        if one is not None:
            speedup = row["rows_per_second"] / one["rows_per_second"]
            row |= {"speedup": round(speedup, 2), "efficiency": round(speedup / gpus, 3)}
        print(json.dumps({key: row.get(key) for key in COLUMNS}), flush=True)
        write_report(arguments.out, "scaling", machine(), list(rows.values()), COLUMNS)
    return 0


COLUMNS = {
    "setting": "setting",
    "seconds_per_step": "s/step",
    "rows_per_second": "rows/s",
    "speedup": "times one GPU",
    "efficiency": "efficiency",
    "peak_gib": "peak GiB a GPU",
}


if __name__ == "__main__":
    sys.exit(main())
