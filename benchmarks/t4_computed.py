"""Compute the time and memory of the recipes on a T4 from its data sheet, with the lengths of a data file's rows.

Nothing is measured, and no GPU is needed: `hw3 check` prints the same line on a machine without one.

    python benchmarks/t4_computed.py --smollm2 DIR --tokenizer DIR [--data FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmark_report import describe_machine, write_report
from random_models import load_shape_config
from transformers import AutoTokenizer

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder, count_tokens
from hw3.modeling.loading import count_parameters
from hw3.training.batch_layout import divide_batch
from hw3.training.datasheet_estimate import T4, choose_strategy_for, compute_run
from hw3.training.step_strategy import Workload

COLUMNS = {
    "setting": "recipe",
    "steps": "steps",
    "seconds_per_step": "s/step in float16, at least",
    "float32_seconds_per_step": "s/step in float32, at least",
    "minutes": "minutes in float16, at least",
    "gib": "GiB, estimated",
    "strategy": "step",
}


def compute(shape: str, tokenizer: Path, data: Path) -> dict[str, Any]:
    """Return one row of the report."""
    recipe, config = load_recipe(Path(f"recipes/{shape}/qlora.yaml")), load_shape_config(shape)
    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(data)]
    lengths = count_tokens([row for row in rows if len(row) <= recipe.data.max_length])
    workload = Workload(recipe, divide_batch(recipe, 1), config, count_parameters(recipe, config)[0], lengths)
    strategy, run = choose_strategy_for(T4, workload), compute_run(T4, workload)
    weights = "dequantized" if strategy.dequantized else "4-bit"
    step = (
        f"CUDA graphs, {weights}, {strategy.tokens_per_replay} tokens" if strategy.cuda_graphs else f"TRL's, {weights}"
    )
    return {
        "setting": shape,
        "steps": run.steps,
        "rows": len(lengths),
        "tokens_per_step": round(recipe.rows_per_step * statistics.mean(tokens for tokens, _ in lengths), 1),
        "seconds_per_step": round(run.seconds_per_step, 3),
        "float32_seconds_per_step": round(compute_run(T4, workload, "float32").seconds_per_step, 3),
        "minutes": round(run.steps * run.seconds_per_step / 60, 1),
        "gib": round(strategy.memory.total / 2**30, 2),
        "strategy": step,
    }


def main() -> int:
    """Compute each recipe and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--smollm2", type=Path, required=True, help="folder of SmolLM2's tokenizer")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of Gemma-2's tokenizer, for the others")
    parser.add_argument("--data", type=Path, default=Path("data/train.json"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    rows = [
        compute(shape, arguments.smollm2 if shape == "smollm2" else arguments.tokenizer, arguments.data)
        for shape in ("smollm2", "gemma", "qwen", "llama")
    ]
    write_report(arguments.output, "t4_computed", describe_machine(), rows, COLUMNS)
    print((arguments.output / "t4_computed.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
