"""What shards the model among processes, and what of a recipe cannot be sharded."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import yaml

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe
from hw3.training.step_strategy import EQUAL_ADAMW, FUSED_ADAMW


def sharded_by() -> str | None:
    """What the launcher shards the model with: `FSDP`, `DeepSpeed` or nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "FSDP"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "DeepSpeed"
    return None


def sharded_as(file: Path) -> str | None:
    """What a launch with this accelerate file will shard the model with, as `sharded_by` would say there.

    Raises:
        UserError: it is no accelerate file.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))["distributed_type"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no file of accelerate's that names a distributed_type") from error
    return {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}.get(found)


def sharding_problems(recipe: Recipe, sharded: str | None) -> list[str]:
    """What cannot be sharded. FSDP2 and ZeRO-3 gather parameters as one floating-point dtype, packed ones too."""
    if sharded is None:
        return []
    problems, quantization, training, dtype = [], recipe.quantization, recipe.training, recipe.model.dtype
    if quantization is not None and quantization.bnb_4bit_quant_storage != dtype:
        problems.append(
            f"quantization.bnb_4bit_quant_storage: found {quantization.bnb_4bit_quant_storage}; {sharded} shards 4-bit "
            f'weights in the dtype of the model alone; this works: SET="quantization.bnb_4bit_quant_storage={dtype}"'
        )
    optim = training.get("optim", FUSED_ADAMW)
    if optim not in EQUAL_ADAMW and ("paged" in optim or "bit" in optim or "bnb" in optim):
        problems.append(
            f"training.optim: {optim} is bitsandbytes', which knows no sharded parameters; this works: "
            f'SET="training.optim={FUSED_ADAMW}"'
        )
    if sharded == "FSDP" and quantization is not None and (recipe.lora or {}).get("layers_to_transform") is not None:
        problems.append(
            "lora.layers_to_transform: FSDP2 gathers a 4-bit layer without an adapter wrongly on a GPU; adapt every "
            "layer, or use quantization=null"
        )
    if sharded == "DeepSpeed":
        if find_spec("deepspeed") is None:
            install = "pip install --no-build-isolation -c constraints.txt '.[deepspeed]'"
            problems.append(f"DeepSpeed is not installed; this installs it: {install}")
        mixed = "float16" if training.get("fp16") else "float32" if training.get("bf16") is False else "bfloat16"
        if mixed != dtype:
            problems.append(
                f"model.dtype: found {dtype}; DeepSpeed computes in the dtype of the weights, and training.bf16 and "
                f'fp16 ask for {mixed}; this works: SET="model.dtype={mixed}"'
            )
    return problems
