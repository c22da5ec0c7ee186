"""Is the captured step the same run as TRL's? On one GPU, the model in this repository, its own rows, bfloat16.

Two plain runs in different batch layouts say what rounding alone does to a run; the captured run is held against the
same bound. Then each is stopped half-way and resumed by the other. The runs share the GPU, each in a process of its
own.

    python benchmarks/equivalence.py
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

from logs import logs_of, loss_differences
from report import machine
from safetensors.torch import load_file

from hw3.common.atomic_io import write_json
from hw3.config.recipe import load_recipe
from hw3.evaluation.evaluate import evaluate_run
from hw3.runs.checkpoints import complete_checkpoints
from hw3.runs.run_dir import environment, read_manifest
from hw3.training.train import train

RECIPE = "recipes/tiny/qlora.yaml"
STEPS = 300
OVERRIDES = (
    f"training.use_cpu=false training.bf16=true model.dtype=bfloat16 quantization.bnb_4bit_compute_dtype=bfloat16 "
    f"training.logging_steps=1 training.save_steps={STEPS // 2} training.report_to=none"
)
# Name, overrides, and by which name's settings the second half is run.
RUNS = {
    "plain 8 x 1": ("speed=plain", None),
    "captured": ("speed=auto", None),
    "plain 2 x 4": ("speed=plain training.per_device_train_batch_size=2 training.gradient_accumulation_steps=4", None),
    "captured, resumed": ("speed=auto", "speed=auto"),
    "plain, resumed by captured": ("speed=plain", "speed=auto"),
    "captured, resumed by plain": ("speed=auto", "speed=plain"),
    "captured, with dropout": ("speed=auto lora.lora_dropout=0.1", None),
    "captured, with dropout, resumed": ("speed=auto lora.lora_dropout=0.1", "speed=auto lora.lora_dropout=0.1"),
}


def train_run(run: Path, first: str, second: str | None) -> dict[str, Any]:
    """One run, its losses and its last checkpoint's score."""
    shutil.rmtree(run, ignore_errors=True)
    halves = [(first, STEPS)] if second is None else [(first, STEPS // 2), (second, STEPS)]
    for overrides, steps in halves:
        recipe = load_recipe(Path(RECIPE), [*OVERRIDES.split(), f"training.max_steps={steps}", *overrides.split()])
        assert train(recipe, run) == 0
    last = complete_checkpoints(run)[-1].path
    logs = logs_of(run)
    assert evaluate_run(run, shots=[0]) == 0
    results = json.loads((run / "eval/eval/results.json").read_text())
    manifest = read_manifest(run)
    assert manifest["speed"]["captured"] == (second or first).startswith("speed=auto"), (
        "the captured step was not taken"
    )
    return {
        "captured": manifest["speed"]["captured"],
        "losses": [log["loss"] for log in logs],
        "grad_norms": [log["grad_norm"] for log in logs],
        "mean_perplexity": results["entries"][-1]["mean_perplexity"],
        "base_mean_perplexity": results["entries"][0]["mean_perplexity"],
        "adapter": last / "adapter_model.safetensors",
    }


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two runs are apart: losses by step, the tuned scores, the adapters."""
    moved = sum(float((one["adapter"][name] - tensor).square().sum()) for name, tensor in other["adapter"].items())
    size = sum(float(tensor.square().sum()) for tensor in other["adapter"].values())
    return {
        **loss_differences(one["losses"], other["losses"]),
        "mean_perplexity": abs(one["mean_perplexity"] / other["mean_perplexity"] - 1),
        "adapter": (moved / size) ** 0.5,
    }


def main() -> int:
    """Train all runs and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--scratch", type=Path, default=Path("scratch/equivalence"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    runs: dict[str, Any] = {}
    with ProcessPoolExecutor(len(RUNS), multiprocessing.get_context("spawn")) as processes:
        started = {
            processes.submit(train_run, arguments.scratch / str(number), *settings): name
            for number, (name, settings) in enumerate(RUNS.items())
        }
        for finished in as_completed(started):
            name = started[finished]
            runs[name] = finished.result()
            runs[name]["adapter"] = load_file(runs[name]["adapter"])
            print(name, runs[name]["mean_perplexity"], runs[name]["losses"][-1], flush=True)
            write_report(arguments.out, {name: runs[name] for name in RUNS if name in runs})
    return 0


def write_report(folder: Path, runs: dict[str, Any]) -> None:
    """What has been found so far."""
    pairs = [
        ("plain 2 x 4", "plain 8 x 1"),
        ("captured", "plain 8 x 1"),
        ("captured, resumed", "captured"),
        ("captured, with dropout, resumed", "captured, with dropout"),
        ("captured, resumed by plain", "plain 8 x 1"),
        ("plain, resumed by captured", "plain 8 x 1"),
    ]
    pairs = [(one, other) for one, other in pairs if one in runs and other in runs]
    facts = environment()
    report = {
        "machine": machine(),
        "versions": facts["versions"],
        "commit": facts["git_commit"],
        "steps": STEPS,
        "relative_differences": [{"run": a, "against": b, **compare(runs[a], runs[b])} for a, b in pairs],
        "runs": [{"run": name, **{key: run[key] for key in run if key != "adapter"}} for name, run in runs.items()],
    }
    write_json(folder / "equivalence.json", report)


if __name__ == "__main__":
    sys.exit(main())
