"""Bases of the recipes' shapes with random weights: time and memory do not depend on what the weights are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

SHAPES = Path(__file__).with_name("shapes.json")  # as their authors published them; the recipes' by their folders


def config_of(shape: str) -> PretrainedConfig:
    """A shape's configuration."""
    return AutoConfig.for_model(**json.loads(SHAPES.read_text())[shape])


def make_base(folder: Path, tokenizer: Path, shape: str = "gemma") -> None:
    """Random weights of a shape, bfloat16, with a tokenizer beside them; nothing where the folder holds a model.

    Args:
        folder: to make.
        tokenizer: a folder that AutoTokenizer reads; its vocabulary may be smaller than the shape's.
        shape: `gemma`, `llama` or `qwen`.
    """
    if (folder / "config.json").exists():
        return
    config = config_of(shape)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")  # as real ones come
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
