"""Compare runs on several GPUs with a run on one: the repository's model in bfloat16, each accelerate file for GPUs.

The reference is TRL's step on one GPU. Compared are each run's losses, and its last checkpoint's score on one GPU. A
second layout of TRL's step on one GPU shows the effect of rounding. Runs share the GPUs; if a case has more processes
than the machine has GPUs, several processes share one (`launching.py`).

    python benchmarks/multi_gpu_equivalence.py [--only 'fsdp2*']
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
from benchmark_report import describe_machine, read_previous_rows, write_report
from launching import CommandError, launch, train
from training_logs import compare_losses, read_loss_logs

from hw3.runs.run import Run

RECIPE = "recipes/tiny/qlora.yaml"
STEPS = 40
OVERRIDES = (
    "training.use_cpu=false training.bf16=true model.dtype=bfloat16 quantization.bnb_4bit_compute_dtype=bfloat16 "
    f"quantization.bnb_4bit_quant_storage=bfloat16 training.save_steps={STEPS // 2} training.logging_steps=1 "
    "training.report_to=none"
)
TRL, AUTO = "speed=plain", "speed=auto"
MICRO_BATCHES = "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=4"
REFERENCE = "one GPU, TRL's step"
# By name: the accelerate file, overrides, processes. Of two numbers the second resumes the run half-way.
CASES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    REFERENCE: ("ddp", TRL, (1,)),
    "one GPU, TRL's step, 2 x 4": ("ddp", f"{TRL} {MICRO_BATCHES}", (1,)),
    "one GPU, CUDA graphs": ("ddp", AUTO, (1,)),
    "ddp, 2 processes, TRL's step": ("ddp", TRL, (2,)),
    "ddp, 2 processes, CUDA graphs": ("ddp", AUTO, (2,)),
    "multi_node, 4 processes, CUDA graphs": ("multi_node", AUTO, (4,)),
    "ddp, 2 processes, resumed with 4": ("ddp", TRL, (2, 4)),
    "fsdp2, 2 processes": ("fsdp2", AUTO, (2,)),
    "fsdp2, 4 processes": ("fsdp2", AUTO, (4,)),
    "fsdp2, 2 processes, resumed with 4": ("fsdp2", AUTO, (2, 4)),
    "zero3, 2 processes": ("zero3", AUTO, (2,)),
    "zero3, 4 processes": ("zero3", AUTO, (4,)),
    "zero3, 2 processes, resumed with 2": ("zero3", AUTO, (2, 2)),
}
COLUMNS = {
    "setting": "setting",
    "loss_first_step": "loss difference, first step",
    "loss_mean": "mean loss difference",
    "loss_largest": "largest loss difference",
    "score": "score difference",
    "failed": "failed",
}


def run_case(name: str, run: Path, gpu: int, timeout_seconds: float) -> dict[str, Any]:
    """Train, and score the last checkpoint on one GPU; return one row of the report."""
    accelerate, overrides, processes = CASES[name]
    row: dict[str, Any] = {"setting": name, "processes": list(processes)}
    one_gpu = {"CUDA_VISIBLE_DEVICES": str(gpu)}
    try:
        for part, number in enumerate(processes, 1):
            steps = f"training.max_steps={STEPS * part // len(processes)}"
            train(
                RECIPE,
                [*OVERRIDES.split(), steps, *overrides.split()],
                run,
                processes=number,
                resume=part > 1,
                accelerate=accelerate,
                timeout_seconds=timeout_seconds,
                environment=one_gpu if number == 1 else None,
            )
        launch(["-m", "hw3", "eval", str(run)], run.with_suffix(".eval.log"), processes=1, environment=one_gpu)
    except CommandError as error:
        return row | {"failed": str(error)}
    entries = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    manifest = Run(run).read_manifest()
    assert entries[-1]["step"] == STEPS, "the last checkpoint was not scored"
    return row | {
        "cuda_graphs": manifest.speed.cuda_graphs,
        "sessions": [session.model_dump() for session in manifest.sessions],
        "losses": [entry["loss"] for entry in read_loss_logs(run)],
        "mean_perplexity": entries[-1]["mean_perplexity"],
    }


def add_differences(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the relative differences of its losses and its score from the reference's."""
    if "losses" not in row or "losses" not in reference:
        return row
    differences = compare_losses(row["losses"], reference["losses"])
    differences["score"] = abs(row["mean_perplexity"] / reference["mean_perplexity"] - 1)
    return row | {name: round(value, 5) for name, value in differences.items()}


def main() -> int:
    """Run all cases at once and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="CASE", help="names, or patterns of names")
    parser.add_argument("--timeout", type=float, default=150, help="the longest time of a run, in seconds")
    parser.add_argument("--scratch", type=Path, default=Path("scratch/multi_gpu_equivalence"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    chosen = [
        name
        for name in CASES
        if name == REFERENCE or any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.only)
    ]
    found = read_previous_rows(arguments.output, "multi_gpu_equivalence")
    gpus = max(1, torch.cuda.device_count())
    with ThreadPoolExecutor(len(chosen)) as threads:
        started = [
            threads.submit(run_case, name, arguments.scratch / f"run-{number}", number % gpus, arguments.timeout)
            for number, name in enumerate(chosen)
        ]
        for finished in as_completed(started):
            row = finished.result()
            found[row["setting"]] = row
            print(json.dumps({key: row[key] for key in row if key not in ("losses", "sessions")}), flush=True)
            if REFERENCE in found:
                rows = [add_differences(found[name], found[REFERENCE]) for name in CASES if name in found]
                write_report(arguments.output, "multi_gpu_equivalence", describe_machine(), rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
