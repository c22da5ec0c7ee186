"""Run recipes/gemma/qlora.yaml on one GPU, on random weights of Gemma-2-2B's shape: 50 steps, 2 checkpoints, scores.

Speed and memory do not depend on the values of the weights; scores do, and mean nothing here. The recipe runs
unchanged, and in float32.

    python benchmarks/gpu_recipe.py --tokenizer DIR     # Gemma's tokenizer, a folder that AutoTokenizer reads
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmark_report import describe_machine, write_report
from random_models import make_random_base
from training_logs import read_loss_logs, seconds_per_step

RECIPE = "recipes/gemma/qlora.yaml"
FLOAT32 = "training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"
SETTINGS = {"unchanged recipe": "", "without bfloat16": FLOAT32}
OVERRIDES = (
    "data.train=data/train.json data.eval=data/eval.json training.max_steps=50 training.save_steps=25 "
    "training.logging_steps=1 training.report_to=none"
)
WARMUP_STEPS = 5
COLUMNS = {"setting": "setting", "seconds_per_step": "s/step", "peak_gib": "peak GiB, training"}


def measure(base: Path, setting: str, scratch: Path) -> dict[str, Any]:
    """Train and score in this process; return one row of the report."""
    from hw3.config.recipe import load_recipe
    from hw3.evaluation.evaluate import evaluate_run
    from hw3.runs.run import Run
    from hw3.training.train import train

    run = scratch / setting.replace(" ", "-")
    overrides = [f"model.pretrained_model_name_or_path={base}", *OVERRIDES.split(), *SETTINGS[setting].split()]
    started = time.monotonic()
    assert train(load_recipe(Path(RECIPE), overrides), run) == 0
    seconds_training = time.monotonic() - started
    checkpoints = Run(run).complete_checkpoints()
    logs = read_loss_logs(run)
    started = time.monotonic()
    assert evaluate_run(Run(run), shots=[0]) == 0
    seconds_scoring = time.monotonic() - started
    results = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))
    session = Run(run).read_manifest().sessions[-1]
    return {
        "setting": setting,
        "overrides": SETTINGS[setting],
        "steps": logs[-1]["step"],
        "checkpoints": [checkpoint.path.name for checkpoint in checkpoints],
        "seconds_training": round(seconds_training, 1),
        "seconds_per_step": round(statistics.median(seconds_per_step(logs[WARMUP_STEPS:])), 4),
        "peak_gib": session.peak_gib,
        "first_loss": logs[0]["loss"],
        "last_loss": logs[-1]["loss"],
        "tokens_seen": logs[-1]["num_input_tokens_seen"],
        "seconds_scoring": round(seconds_scoring, 1),
        "entries": [
            {key: entry[key] for key in ("step", "mean_perplexity", "token_perplexity", "tokens", "seconds")}
            for entry in results["entries"]
        ],
        "rows_scored": results["data"]["rows"],
    }


def main() -> int:
    """Measure each setting in a separate process and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, default=Path("scratch/gpu_recipe"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = arguments.scratch / "gemma-2-2b-random"
    if arguments.setting:
        row = measure(base, arguments.setting, arguments.scratch)
        (arguments.scratch / "row.json").write_text(json.dumps(row), encoding="utf-8")
        return 0
    make_random_base(base, arguments.tokenizer)
    rows = []
    for setting in SETTINGS:
        command = [sys.executable, __file__, "--setting", setting, "--tokenizer", str(arguments.tokenizer)]
        subprocess.run([*command, "--scratch", str(arguments.scratch)], check=True)
        rows.append(json.loads((arguments.scratch / "row.json").read_text(encoding="utf-8")))
        write_report(arguments.output, "gpu_recipe", describe_machine(), rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
