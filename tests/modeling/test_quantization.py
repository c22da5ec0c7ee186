"""Scores with dequantized weights are bitwise those with 4-bit weights."""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit

from hw3.config.recipe import load_recipe
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.perplexity import score_rows
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_base_model
from hw3.modeling.quantization import dequantize, should_dequantize
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training.train import train

CPU = torch.device("cpu")


def test_dequantize_does_not_change_scores(mini_recipe: Path, encoded_rows: list[EncodedRow]) -> None:
    recipe = load_recipe(mini_recipe)
    quantized = load_base_model(recipe, CPU).eval()
    dequantized = dequantize(load_base_model(recipe, CPU).eval())
    assert not any(isinstance(module, Linear4bit) for module in dequantized.modules())
    assert score_rows(dequantized, encoded_rows, tokens_per_batch=200) == score_rows(
        quantized, encoded_rows, tokens_per_batch=200
    )


def test_dequantize_does_not_change_scores_with_an_adapter_in_bfloat16(
    mini_recipe: Path, tmp_path: Path, encoded_rows: list[EncodedRow]
) -> None:
    """On a 4-bit layer, and only there, PEFT itself would round the adapter's output to bfloat16 before adding it."""
    train(load_recipe(mini_recipe), tmp_path / "run")
    adapter = find_complete_checkpoints(tmp_path / "run")[-1].path
    recipe = load_recipe(mini_recipe, ["model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16"])
    models = [load_base_model(recipe, CPU).eval(), dequantize(load_base_model(recipe, CPU).eval())]
    scores = []
    for model in models:
        AdapterSlot(model).load(adapter)
        scores.append(score_rows(model, encoded_rows, tokens_per_batch=200))
    assert scores[0] == scores[1]


def test_should_dequantize_only_if_scores_stay_the_same(mini_recipe: Path) -> None:
    assert should_dequantize(load_recipe(mini_recipe), 100, CPU)
    assert not should_dequantize(load_recipe(mini_recipe, ["quantization=null"]), 100, CPU)
    other_compute_dtype = load_recipe(mini_recipe, ["quantization.bnb_4bit_compute_dtype=bfloat16"])
    assert not should_dequantize(other_compute_dtype, 100, CPU)
