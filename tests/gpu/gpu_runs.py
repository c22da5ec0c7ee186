"""Base models and recipes for the GPU tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import character_tokenizer, read_losses, write_recipe
from random_models import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from hw3.config.recipe import load_recipe
from hw3.training.plan import plan_run
from hw3.training.step_strategy import choose_step_strategy


def write_shape_base(folder: Path, shape: str, device: torch.device) -> Path:
    """Write a random bfloat16 model as wide as a recipe's base, with two layers and the character tokenizer.

    Its embeddings are not tied: a random tied model would repeat its last token.

    Args:
        folder: where to write.
        shape: a name in `benchmarks/shapes.json`.
        device: where the weights are drawn.

    Returns:
        The folder.
    """
    values = json.loads(SHAPES.read_text(encoding="utf-8"))[shape]
    values |= {"vocab_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}
    values |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def write_gpu_recipe(folder: Path, base: Path) -> Path:
    """Write the mini recipe and its data files, changed to train in bfloat16 on a GPU; return the recipe's path."""
    path = write_recipe(folder, base)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    is_gemma = AutoConfig.from_pretrained(base).model_type == "gemma2"
    recipe["model"] |= {"dtype": "bfloat16", "attn_implementation": "eager" if is_gemma else "sdpa"}
    recipe["quantization"] |= {
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    recipe["lora"] |= {"r": 16, "lora_dropout": 0.0}
    recipe["training"] |= {"use_cpu": False, "bf16": True, "learning_rate": 1e-3, "logging_steps": 1}
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


def read_manifest(run: Path) -> dict[str, Any]:
    """Return the manifest of a run."""
    return json.loads((run / "manifest.json").read_text(encoding="utf-8"))


def find_memory(
    recipe_file: Path, run: Path, device: torch.device, settings: tuple[bool, bool], sizes: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """Return the first (free, total) bytes of `sizes` with which `speed: auto` plans (CUDA graphs, dequantized)."""
    workload = plan_run(load_recipe(recipe_file), run, 1).workload
    for memory in sizes:
        strategy = choose_step_strategy(workload, device, memory)
        if (strategy.cuda_graphs, strategy.dequantized) == settings:
            return memory
    raise AssertionError(f"no amount of memory lets `speed: auto` choose {settings}")


def assert_trained(run: Path, *, cuda_graphs: bool, dequantized: bool) -> dict[str, Any]:
    """Assert that a run of the mini recipe is complete, and how its steps were computed; return its only session."""
    manifest = read_manifest(run)
    assert (manifest["speed"]["cuda_graphs"], manifest["speed"]["dequantized"]) == (cuda_graphs, dequantized)
    (session,) = manifest["sessions"]
    assert session["to_step"] == 12 and len(read_losses(run)) == 12
    return session
