"""Is a run on several GPUs the run of one? The small model, bfloat16, through every accelerate file that is for GPUs.

Each run's losses and its last checkpoint's score, on one GPU, are held against those of TRL's step on one GPU; how far
two layouts of that step are apart is rounding's share. Runs share the GPUs; where a case has more processes than the
machine has GPUs, several processes share one (`launching.py`).

    python benchmarks/same_result.py [--only 'fsdp2*']
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from launching import RunEnded, launch, train
from logs import logs_of, loss_differences
from report import kept_rows, machine, write_report

from hw3.runs.run_dir import read_manifest

RECIPE = "recipes/tiny/qlora.yaml"
STEPS = 40
OVERRIDES = (
    "training.use_cpu=false training.bf16=true model.dtype=bfloat16 quantization.bnb_4bit_compute_dtype=bfloat16 "
    f"quantization.bnb_4bit_quant_storage=bfloat16 training.save_steps={STEPS // 2} training.logging_steps=1 "
    "training.report_to=none"
)
PLAIN, AUTO = "speed=plain", "speed=auto"
ROWS = "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=4"
REFERENCE = "one GPU, TRL's step"
# Name: the accelerate file, overrides, processes; of two numbers the second goes on where the first was stopped.
CASES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    REFERENCE: ("ddp", PLAIN, (1,)),
    "one GPU, TRL's step, 2 x 4": ("ddp", f"{PLAIN} {ROWS}", (1,)),
    "one GPU, captured": ("ddp", AUTO, (1,)),
    "ddp, 2 processes, TRL's step": ("ddp", PLAIN, (2,)),
    "ddp, 2 processes, captured": ("ddp", AUTO, (2,)),
    "multi_node, 4 processes, captured": ("multi_node", AUTO, (4,)),
    "ddp, 2 processes begin, 4 go on": ("ddp", PLAIN, (2, 4)),
    "fsdp2, 2 processes": ("fsdp2", AUTO, (2,)),
    "fsdp2, 4 processes": ("fsdp2", AUTO, (4,)),
    "fsdp2, 2 processes begin, 4 go on": ("fsdp2", AUTO, (2, 4)),
    "zero3, 2 processes": ("zero3", AUTO, (2,)),
    "zero3, 4 processes": ("zero3", AUTO, (4,)),
    "zero3, 2 processes, stopped and gone on with": ("zero3", AUTO, (2, 2)),
}


def run_case(name: str, run: Path, gpu: int, seconds: float) -> dict[str, Any]:
    """Train, half by half where there are two, and score the last checkpoint on one GPU."""
    accelerate, overrides, processes = CASES[name]
    row: dict[str, Any] = {"setting": name, "processes": list(processes)}
    one = {"CUDA_VISIBLE_DEVICES": str(gpu)}
    try:
        for half, number in enumerate(processes, 1):
            steps = f"training.max_steps={STEPS * half // len(processes)}"
            train(
                RECIPE,
                [*OVERRIDES.split(), steps, *overrides.split()],
                run,
                processes=number,
                go_on=half > 1,
                accelerate=accelerate,
                seconds=seconds,
                environment=one if number == 1 else None,
            )
        launch(["-m", "hw3", "eval", str(run)], run.with_suffix(".eval.log"), processes=1, environment=one)
    except RunEnded as problem:
        return row | {"failed": str(problem)}
    entries = json.loads((run / "eval/eval/results.json").read_text())["entries"]
    manifest = read_manifest(run)
    assert entries[-1]["step"] == STEPS, "the last checkpoint was not scored"
    return row | {
        "captured": manifest["speed"]["captured"],
        "sessions": manifest["sessions"],
        "losses": [log["loss"] for log in logs_of(run)],
        "mean_perplexity": entries[-1]["mean_perplexity"],
    }


def compared(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """A row with how far its losses and its score are from the reference's, relative."""
    if "losses" not in row or "losses" not in reference:
        return row
    apart = loss_differences(row["losses"], reference["losses"])
    apart["score"] = abs(row["mean_perplexity"] / reference["mean_perplexity"] - 1)
    return row | {name: round(value, 5) for name, value in apart.items()}


def main() -> int:
    """Run all cases at once and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="CASE", help="names, or patterns of them")
    parser.add_argument("--seconds", type=float, default=150, help="the longest that a run may take")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/same_result"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    chosen = [
        name
        for name in CASES
        if name == REFERENCE or any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)
    ]
    found = kept_rows(arguments.out, "same_result")
    gpus = max(1, torch.cuda.device_count())
    with ThreadPoolExecutor(len(chosen)) as threads:
        started = [
            threads.submit(run_case, name, arguments.scratch / f"run-{number}", number % gpus, arguments.seconds)
            for number, name in enumerate(chosen)
        ]
        for finished in as_completed(started):
            row = finished.result()
            found[row["setting"]] = row
            print(json.dumps({key: row[key] for key in row if key not in ("losses", "sessions")}), flush=True)
            if REFERENCE in found:
                rows = [compared(found[name], found[REFERENCE]) for name in CASES if name in found]
                write_report(arguments.out, "same_result", machine(), rows, COLUMNS)
    return 0


COLUMNS = {
    "setting": "setting",
    "loss_first_step": "loss, first step",
    "loss_mean": "losses, mean",
    "loss_most": "losses, most",
    "score": "score",
    "failed": "failed",
}


if __name__ == "__main__":
    sys.exit(main())
