"""Base models and recipes for the GPU tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import character_tokenizer, write_recipe
from random_models import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM


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
