"""Measure how far bfloat16 scores are from a float32 run of the same weights: this project and the course's loop.

The base model of a fine-tuned checkpoint is loaded in NF4 and bfloat16, as in the large recipes. The error is the root
mean square, over rows, of the differences of log-likelihoods.

    python benchmarks/scoring_precision.py outputs/homework checkpoint-100 --data data/homework/public_test.json
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from benchmark_report import describe_machine, write_report
from transformers import PreTrainedModel

from hw3.config.recipe import Recipe, load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.perplexity import score_rows
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.devices import select_device
from hw3.modeling.loading import load_base_model, load_tokenizer
from hw3.modeling.quantization import dequantize

BF16_OVERRIDES = ["model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16"]
COURSE_LOOP = "the course's loop: 4-bit, one row at a time"
COLUMNS = {
    "setting": "setting",
    "rms_error_nats": "RMS error, nats per row",
    "relative_to_course_loop": "relative to the course's loop",
}


@torch.no_grad()
def score_one_by_one(model: PreTrainedModel, rows: list[EncodedRow]) -> list[float]:
    """Score as the course's loop does: full logits of one row at a time, float32 cross-entropy.

    Returns:
        The negative log-likelihood of each row, in nats.
    """
    nlls = []
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        start = len(row.prompt_ids)
        losses = torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none")
        nlls.append(losses.double().sum().item())
    return nlls


def score_batched(
    model: PreTrainedModel, rows: list[EncodedRow], *, tokens_per_batch: int = 1024, reuse_prefix: bool = True
) -> list[float]:
    """Score with this project; return the negative log-likelihood of each row, in nats."""
    scores = score_rows(model, rows, tokens_per_batch=tokens_per_batch, reuse_prefix=reuse_prefix)
    return [score.nll for score in scores]


def root_mean_square_error(values: list[float], expected: list[float]) -> float:
    """Return the root of the mean squared difference."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(values, expected, strict=True)) / len(expected))


def load_checkpoint(recipe: Recipe, folder: Path, *, dequantized: bool) -> PreTrainedModel:
    """Load the base model with a checkpoint's adapter."""
    model = load_base_model(recipe, select_device(recipe)).eval()
    model = dequantize(model) if dequantized else model
    AdapterSlot(model).load(folder)
    return model


def main() -> int:
    """Score in each setting and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.run / "recipe.yaml", BF16_OVERRIDES)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(arguments.data)]
    folder = arguments.run / arguments.checkpoint
    quantized = load_checkpoint(recipe, folder, dequantized=False)
    dequantized = load_checkpoint(recipe, folder, dequantized=True)
    nlls = {
        COURSE_LOOP: score_one_by_one(quantized, rows),
        "this project, 4-bit": score_batched(quantized, rows),
        "this project, dequantized": score_batched(dequantized, rows),
        "this project, dequantized, no prefix reuse": score_batched(dequantized, rows, reuse_prefix=False),
        "this project, dequantized, 4096 tokens per batch": score_batched(dequantized, rows, tokens_per_batch=4096),
    }
    expected = score_one_by_one(dequantized.float(), rows)
    nlls["this project, float32"] = score_batched(dequantized, rows)
    errors = {setting: root_mean_square_error(values, expected) for setting, values in nlls.items()}
    report = [
        {
            "setting": setting,
            "rms_error_nats": error,
            "relative_to_course_loop": round(error / errors[COURSE_LOOP], 4),
            "rows": len(rows),
        }
        for setting, error in errors.items()
    ]
    write_report(arguments.output, "scoring_precision", describe_machine(), report, COLUMNS)
    print((arguments.output / "scoring_precision.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
