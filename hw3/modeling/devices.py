"""Select the device, and check that it supports the recipe's settings."""

from __future__ import annotations

import os

import torch

from hw3.common.distributed import local_rank
from hw3.config.recipe import Recipe

CPU_SETTINGS = (
    "training.use_cpu=true training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"
)
NO_BF16_SETTINGS = "training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"


def device_of(recipe: Recipe) -> torch.device:
    """Where this process runs: its own GPU, or the CPU where the recipe says so or there is no GPU."""
    if recipe.training.get("use_cpu") or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def device_problems(recipe: Recipe, processes: int) -> list[str]:
    """What of the recipe this machine cannot do, each with the complete `SET=` that works here.

    Args:
        recipe: the recipe.
        processes: how many processes will run it on this machine.
    """
    problems = []
    training, on_cpu = recipe.training, bool(recipe.training.get("use_cpu"))
    uses_bf16 = training.get("bf16", True) is not False and not training.get("fp16")
    uses_bf16 |= recipe.model.dtype == "bfloat16"
    uses_bf16 |= recipe.quantization is not None and recipe.quantization.bnb_4bit_compute_dtype == "bfloat16"
    cpu, gpu = CPU_SETTINGS, NO_BF16_SETTINGS
    if recipe.quantization is None:
        cpu, gpu = (settings.rpartition(" ")[0] for settings in (cpu, gpu))
    if on_cpu:
        if training.get("bf16", True) is not False or training.get("fp16"):
            problems.append(f'training on a CPU is done in float32; this works: SET="{cpu}"')
    elif not torch.cuda.is_available():
        problems.append(f'this machine has no GPU that PyTorch can use; on the CPU (slow) this works: SET="{cpu}"')
    elif uses_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        problems.append(f'{name} has no bfloat16; float32, slower but never out of range, works: SET="{gpu}"')
    elif processes > torch.cuda.device_count() and "LOCAL_WORLD_SIZE" not in os.environ:
        problems.append(f"{processes} processes, but {torch.cuda.device_count()} GPUs here; set GPUS to that or less")
    if recipe.model.device_map is not None and processes > 1:
        problems.append(
            "model.device_map: auto spreads one model over all GPUs, which clashes with one process a GPU; set "
            "model.device_map=null or run without a launcher (GPUS=1)"
        )
    return problems
