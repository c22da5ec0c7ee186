"""How far bfloat16 scores are from a float32 run of the same weights: ours, and one row at a time.

On a tuned checkpoint, the base in NF4 and bfloat16 as the large recipes have it. The error is the root mean square,
over rows, of the difference of log-likelihoods.

    python benchmarks/exactness.py outputs/homework checkpoint-100 --data data/homework/public_test.json
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from report import machine, write_report
from transformers import PreTrainedModel

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.perplexity import score_rows
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.devices import device_of
from hw3.modeling.loading import load_base, load_tokenizer
from hw3.modeling.quantization import dequantize

BF16 = ["model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16"]


@torch.no_grad()
def one_row_at_a_time(model: PreTrainedModel, rows: list[EncodedRow]) -> list[float]:
    """The course's loop: full logits of each row alone, float32 cross-entropy; summed in nats."""
    sums = []
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        start = len(row.prompt_ids)
        losses = torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none")
        sums.append(losses.double().sum().item())
    return sums


def root_mean_square(values: list[float], truth: list[float]) -> float:
    """Of the differences, in nats a row."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(values, truth, strict=True)) / len(truth))


def main() -> int:
    """Score in every way and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.run / "recipe.yaml", BF16)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(arguments.data)]
    device, folder = device_of(recipe), arguments.run / arguments.checkpoint

    def ours(model: PreTrainedModel, budget: int = 1024, reuse: bool = True) -> list[float]:
        return [score.nll for score in score_rows(model, rows, tokens_per_batch=budget, reuse_prefix=reuse)]

    def loaded(plain: bool) -> PreTrainedModel:
        model = load_base(recipe, device).eval()
        model = dequantize(model) if plain else model
        AdapterSlot(model).load(folder)
        return model

    packed, plain = loaded(plain=False), loaded(plain=True)
    found = {
        "one row at a time, NF4 packed (the course's loop)": one_row_at_a_time(packed, rows),
        "ours, NF4 packed": ours(packed),
        "ours, dequantized once": ours(plain),
        "ours, dequantized once, no prefix reuse": ours(plain, reuse=False),
        "ours, dequantized once, 4096 tokens a batch": ours(plain, budget=4096),
    }
    truth = one_row_at_a_time(plain.float(), rows)
    found["ours, float32"] = ours(plain)
    course = root_mean_square(found["one row at a time, NF4 packed (the course's loop)"], truth)
    report = [
        {
            "setting": name,
            "rms_error_nats": root_mean_square(values, truth),
            "ratio_to_the_courses_loop": round(root_mean_square(values, truth) / course, 4),
            "rows": len(rows),
        }
        for name, values in found.items()
    ]
    columns = {"setting": "setting", "rms_error_nats": "RMS error, nats a row", "ratio_to_the_courses_loop": "ratio"}
    write_report(arguments.out, "exactness", machine(), report, columns)
    print((arguments.out / "exactness.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
