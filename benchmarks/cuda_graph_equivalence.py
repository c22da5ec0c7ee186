"""Compare training with the CUDA-graph step and with TRL's step, on one GPU, with the repository's model in bfloat16.

Two runs with TRL's step in different batch layouts show the effect of rounding; the CUDA-graph run is compared with the
same reference. Runs of both kinds are also stopped half-way and resumed with either step. All runs share the GPU, each
in a separate process.

    python benchmarks/cuda_graph_equivalence.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmark_report import describe_machine
from safetensors.torch import load_file
from training_logs import compare_losses, read_loss_logs

from hw3.common.atomic_io import write_json
from hw3.config.recipe import load_recipe
from hw3.evaluation.evaluate import evaluate_run
from hw3.runs.manifest import git_commit, installed_versions
from hw3.runs.run import Run
from hw3.training.train import train

RECIPE = "recipes/tiny/qlora.yaml"
STEPS = 300
OVERRIDES = (
    f"training.use_cpu=false training.bf16=true model.dtype=bfloat16 quantization.bnb_4bit_compute_dtype=bfloat16 "
    f"training.logging_steps=1 training.save_steps={STEPS // 2} training.report_to=none"
)
TRL, CUDA_GRAPHS = "speed=plain", "speed=auto"
DROPOUT = f"{CUDA_GRAPHS} lora.lora_dropout=0.1"
MICRO_BATCHES = "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=4"
# Overrides by name of the run, and overrides of the second half if the run is resumed.
RUNS = {
    "TRL, 8 x 1": (TRL, None),
    "CUDA graphs": (CUDA_GRAPHS, None),
    "TRL, 2 x 4": (f"{TRL} {MICRO_BATCHES}", None),
    "CUDA graphs, resumed": (CUDA_GRAPHS, CUDA_GRAPHS),
    "TRL, resumed with CUDA graphs": (TRL, CUDA_GRAPHS),
    "CUDA graphs, resumed with TRL": (CUDA_GRAPHS, TRL),
    "CUDA graphs, dropout": (DROPOUT, None),
    "CUDA graphs, dropout, resumed": (DROPOUT, DROPOUT),
}
# (Run, the run that it is compared with).
COMPARISONS = [
    ("TRL, 2 x 4", "TRL, 8 x 1"),
    ("CUDA graphs", "TRL, 8 x 1"),
    ("CUDA graphs, resumed", "CUDA graphs"),
    ("CUDA graphs, dropout, resumed", "CUDA graphs, dropout"),
    ("CUDA graphs, resumed with TRL", "TRL, 8 x 1"),
    ("TRL, resumed with CUDA graphs", "TRL, 8 x 1"),
]


def train_run(run: Path, first: str, second: str | None) -> dict[str, Any]:
    """Train a run, in two halves if `second` is given; return its losses and its last checkpoint's score."""
    shutil.rmtree(run, ignore_errors=True)
    halves = [(first, STEPS)] if second is None else [(first, STEPS // 2), (second, STEPS)]
    for overrides, steps in halves:
        recipe = load_recipe(Path(RECIPE), [*OVERRIDES.split(), f"training.max_steps={steps}", *overrides.split()])
        assert train(recipe, run) == 0
    logs = read_loss_logs(run)
    assert evaluate_run(Run(run), shots=[0]) == 0
    results = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))
    cuda_graphs = Run(run).read_manifest().speed.cuda_graphs
    assert cuda_graphs == (second or first).startswith(CUDA_GRAPHS), "the run did not use the CUDA-graph step"
    return {
        "cuda_graphs": cuda_graphs,
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
        "mean_perplexity": results["entries"][-1]["mean_perplexity"],
        "base_mean_perplexity": results["entries"][0]["mean_perplexity"],
        "adapter": Run(run).complete_checkpoints()[-1].path / "adapter_model.safetensors",
    }


def compare(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Return the relative differences of two runs: losses, last score, and adapters (of the 2-norm)."""
    weights = reference["adapter"].items()
    difference = sum(float((run["adapter"][name] - tensor).square().sum()) for name, tensor in weights)
    size = sum(float(tensor.square().sum()) for _, tensor in weights)
    return {
        **compare_losses(run["losses"], reference["losses"]),
        "mean_perplexity": abs(run["mean_perplexity"] / reference["mean_perplexity"] - 1),
        "adapter": (difference / size) ** 0.5,
    }


def main() -> int:
    """Train all runs at once and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--scratch", type=Path, default=Path("scratch/cuda_graph_equivalence"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    runs: dict[str, Any] = {}
    with ProcessPoolExecutor(len(RUNS), multiprocessing.get_context("spawn")) as processes:
        started = {
            processes.submit(train_run, arguments.scratch / str(number), *overrides): name
            for number, (name, overrides) in enumerate(RUNS.items())
        }
        for finished in as_completed(started):
            name = started[finished]
            runs[name] = finished.result()
            runs[name]["adapter"] = load_file(runs[name]["adapter"])
            print(name, runs[name]["mean_perplexity"], runs[name]["losses"][-1], flush=True)
            write_equivalence_report(arguments.output, {name: runs[name] for name in RUNS if name in runs})
    return 0


def write_equivalence_report(folder: Path, runs: dict[str, Any]) -> None:
    """Write the runs that are finished and their comparisons."""
    pairs = [(run, reference) for run, reference in COMPARISONS if run in runs and reference in runs]
    report = {
        "machine": describe_machine(),
        "versions": installed_versions(),
        "commit": git_commit(),
        "steps": STEPS,
        "relative_differences": [
            {"run": run, "reference": reference, **compare(runs[run], runs[reference])} for run, reference in pairs
        ],
        "runs": [{"run": name, **{key: run[key] for key in run if key != "adapter"}} for name, run in runs.items()],
    }
    write_json(folder / "cuda_graph_equivalence.json", report)


if __name__ == "__main__":
    sys.exit(main())
