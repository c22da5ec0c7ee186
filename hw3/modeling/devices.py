"""Select the device, and check that it supports the recipe's settings."""

from __future__ import annotations

import os

import torch

from hw3.common.distributed import get_local_rank
from hw3.config.recipe import Recipe

# Overrides for `SET=`. The last one of each applies to quantized recipes only.
CPU_OVERRIDES = (
    "training.use_cpu=true training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"
)
NO_BF16_OVERRIDES = "training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"


def select_device(recipe: Recipe) -> torch.device:
    """Return this process's own GPU; or the CPU, if the recipe sets `use_cpu` or there is no GPU."""
    if recipe.training.get("use_cpu") or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", get_local_rank())


def describe_device(device: torch.device) -> str:
    """Return `cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def find_missing_gpu(recipe: Recipe) -> str | None:
    """Return a message if the recipe needs a GPU and there is none; None otherwise."""
    if recipe.training.get("use_cpu") or torch.cuda.is_available():
        return None
    overrides = CPU_OVERRIDES if recipe.quantization is not None else CPU_OVERRIDES.rpartition(" ")[0]
    return f'this machine has no GPU that PyTorch can use; to train on the CPU, which is slow, use SET="{overrides}"'


def find_device_problems(recipe: Recipe, num_processes: int) -> list[str]:
    """Return what this machine does not support of the recipe, each problem with the `SET=` that works here.

    Args:
        recipe: the recipe.
        num_processes: how many processes will run it on this machine.
    """
    problems = []
    training, use_cpu = recipe.training, bool(recipe.training.get("use_cpu"))
    uses_bf16 = training.get("bf16", True) is not False and not training.get("fp16")
    uses_bf16 |= recipe.model.dtype == "bfloat16"
    uses_bf16 |= recipe.quantization is not None and recipe.quantization.bnb_4bit_compute_dtype == "bfloat16"
    cpu_overrides, gpu_overrides = CPU_OVERRIDES, NO_BF16_OVERRIDES
    if recipe.quantization is None:
        cpu_overrides = cpu_overrides.rpartition(" ")[0]
        gpu_overrides = gpu_overrides.rpartition(" ")[0]
    if use_cpu:
        if training.get("bf16", True) is not False or training.get("fp16"):
            problems.append(f'training.use_cpu: training on a CPU needs float32; use SET="{cpu_overrides}"')
    elif (missing_gpu := find_missing_gpu(recipe)) is not None:
        problems.append(missing_gpu)
    elif uses_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(
            f"{torch.cuda.get_device_name()} does not support bfloat16; use float32, which is slower but does not "
            f'overflow as float16 does: SET="{gpu_overrides}"'
        )
    elif num_processes > torch.cuda.device_count() and "LOCAL_WORLD_SIZE" not in os.environ:
        count = torch.cuda.device_count()
        problems.append(f"{num_processes} processes need a GPU each, but this machine has {count}; use GPUS={count}")
    if recipe.model.device_map is not None and num_processes > 1:
        problems.append(
            "model.device_map: auto spreads one model over all GPUs, which conflicts with one process per GPU; set "
            "model.device_map=null or run without a launcher (GPUS=1)"
        )
    return problems
