"""Find out how the launcher shards the model, and which parts of a recipe cannot be sharded."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe
from hw3.config.yaml_loader import read_yaml
from hw3.training.optimizer_state import EQUIVALENT_ADAMW, FUSED_ADAMW

Sharding = Literal["FSDP", "DeepSpeed"]


def sharding_from_env() -> Sharding | None:
    """Return what `accelerate launch` shards the model with, as its environment variables report; None for nothing."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "FSDP"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "DeepSpeed"
    return None


def sharding_from_file(path: Path) -> Sharding | None:
    """Return what a launch with an accelerate configuration file will shard the model with; None for nothing.

    Raises:
        UserError: the file is not an accelerate configuration file.
    """
    expected = "expected an accelerate configuration file with a distributed_type; see accelerate_configs/"
    try:
        distributed_type = str(read_yaml(path).values["distributed_type"])
    except UserError as error:
        raise UserError(f"{error}; {expected}") from error
    except KeyError:
        raise UserError(f"{path}: {expected}") from None
    names: dict[str, Sharding] = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}
    return names.get(distributed_type)


def find_sharding_problems(recipe: Recipe, sharding: Sharding | None) -> list[str]:
    """Return a message for each setting of a recipe that cannot be sharded.

    FSDP2 and ZeRO-3 gather all parameters in one floating-point dtype, 4-bit ones included.
    """
    if sharding is None:
        return []
    if recipe.model.dtype == "float16":
        return [f"model.dtype: found float16, which {sharding} cannot shard; use ACCELERATE=ddp, or float32"]
    problems = [*_quantization_problems(recipe, sharding), *_optimizer_problems(recipe)]
    if recipe.evaluation.during_training:
        problems.append(
            f"evaluation.during_training: {sharding} shards the model, so checkpoints cannot be scored beside it; "
            'use ACCELERATE=ddp, or SET="evaluation.during_training=false" and make eval after training'
        )
    return [*problems, *_deepspeed_problems(recipe)] if sharding == "DeepSpeed" else problems


def _quantization_problems(recipe: Recipe, sharding: Sharding) -> list[str]:
    if recipe.quantization is None:
        return []
    problems, storage, dtype = [], recipe.quantization.bnb_4bit_quant_storage, recipe.model.dtype
    if storage != dtype:
        problems.append(
            f"quantization.bnb_4bit_quant_storage: found {storage}; {sharding} shards 4-bit weights only in the "
            f'model\'s dtype; use SET="quantization.bnb_4bit_quant_storage={dtype}"'
        )
    if sharding == "FSDP" and (recipe.lora or {}).get("layers_to_transform") is not None:
        problems.append(
            "lora.layers_to_transform: FSDP2 on a GPU gathers a 4-bit layer without an adapter wrongly; adapt every "
            "layer, or use quantization=null"
        )
    return problems


def _optimizer_problems(recipe: Recipe) -> list[str]:
    optim = recipe.training.get("optim", FUSED_ADAMW)
    if optim in EQUIVALENT_ADAMW or not any(word in optim for word in ("paged", "bit", "bnb")):
        return []
    return [
        f"training.optim: found {optim}; the optimizers of bitsandbytes do not support sharded parameters; use "
        f'SET="training.optim={FUSED_ADAMW}"'
    ]


def _deepspeed_problems(recipe: Recipe) -> list[str]:
    problems, training, dtype = [], recipe.training, recipe.model.dtype
    if find_spec("deepspeed") is None:
        install = "pip install --no-build-isolation -c constraints.txt '.[deepspeed]'"
        problems.append(f"DeepSpeed is not installed; install it: {install}")
    autocast_dtype = "float16" if training.get("fp16") else "float32" if training.get("bf16") is False else "bfloat16"
    if autocast_dtype != dtype:
        problems.append(
            f"model.dtype: found {dtype}; DeepSpeed computes in the dtype of the weights, and training.bf16 and fp16 "
            f'ask for {autocast_dtype}; use SET="model.dtype={autocast_dtype}"'
        )
    return problems
