"""Measure training throughput on 1, 2 and 4 GPUs of one machine, with the launcher and accelerate file that users have.

The recipe is unchanged, with `speed: auto`. Rows are 8 per GPU, and in a second series 8 per optimizer step.

    python benchmarks/scaling.py --tokenizer DIR --data FILE [--gpus 1 2 4]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_report import describe_machine, read_previous_rows, write_report
from gpu_recipe import RECIPE
from launching import read_run, train
from random_models import make_random_base

STEPS, LOGGING_STEPS = 100, 10
ROWS_PER_GPU = ROWS_PER_STEP = 8
COLUMNS = {
    "setting": "setting",
    "seconds_per_step": "s/step",
    "rows_per_second": "rows/s",
    "speedup": "speedup",
    "efficiency": "efficiency",
    "peak_gib": "peak GiB per GPU",
}


def measure(gpus: int, rows_per_step: int, overrides: list[str], run: Path) -> dict[str, Any]:
    """Train once through `accelerate launch`; return one row of the report."""
    overrides = [
        *overrides,
        "training.per_device_train_batch_size=4",
        f"training.gradient_accumulation_steps={rows_per_step // 4}",
        f"training.max_steps={STEPS}",
        f"training.save_steps={STEPS}",
        f"training.logging_steps={LOGGING_STEPS}",
        "training.report_to=none",
    ]
    train(RECIPE, overrides, run, processes=gpus)
    measured = read_run(run, warmup_entries=2)
    return {
        "setting": f"{gpus} GPU{'s' if gpus > 1 else ''}, {rows_per_step} rows per step",
        "gpus": gpus,
        "rows_per_step": rows_per_step,
        "rows_per_second": round(rows_per_step / measured["seconds_per_step"], 1),
        **measured,
    }


def main() -> int:
    """Measure each number of GPUs and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--fixed-step", type=int, nargs="*", default=[2, 4], help="numbers of GPUs that share 8 rows")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--append", action="store_true", help="keep the rows of the existing report (same machine)")
    arguments = parser.parse_args()
    most = max(arguments.gpus + arguments.fixed_step)
    if most > torch.cuda.device_count():
        raise SystemExit(f"--gpus: this machine has {torch.cuda.device_count()} GPUs, fewer than {most}")
    base = arguments.scratch / "gemma-2-2b-random"
    make_random_base(base, arguments.tokenizer)
    overrides = [f"model.pretrained_model_name_or_path={base}", f"data.train={arguments.data}"]
    overrides += ["data.eval=data/eval.json"]
    rows = read_previous_rows(arguments.output, "scaling") if arguments.append else {}
    cases = [(gpus, ROWS_PER_GPU * gpus) for gpus in arguments.gpus]
    cases += [(gpus, ROWS_PER_STEP) for gpus in arguments.fixed_step]
    for gpus, rows_per_step in cases:
        row = measure(gpus, rows_per_step, overrides, arguments.scratch / "scaling")
        rows[row["setting"]] = row
        one_gpu = next((row for row in rows.values() if row["gpus"] == 1), None)
        if one_gpu is not None:
            speedup = row["rows_per_second"] / one_gpu["rows_per_second"]
            row |= {"speedup": round(speedup, 2), "efficiency": round(speedup / gpus, 3)}
        print(json.dumps({key: row.get(key) for key in COLUMNS}), flush=True)
        write_report(arguments.output, "scaling", describe_machine(), list(rows.values()), COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
