"""Select the device, and check that it supports the recipe's settings."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from hw3.common.distributed import get_local_rank
from hw3.config.recipe import Recipe

# Overrides for `SET=`. The last one applies to quantized recipes only.
CPU_OVERRIDES = (
    "training.use_cpu=true training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"
)
NO_BF16_OVERRIDES = "model.dtype=auto"
# Turing (T4, RTX 20 series), the oldest architecture that PyTorch's builds for CUDA 13 have kernels for.
OLDEST_CAPABILITY = (7, 5)


def resolve_dtype(recipe: Recipe, saved: Recipe | None = None) -> Recipe:
    """Replace `model.dtype: auto` by the dtype of a run that exists, or else by the best that this machine supports.

    This is bfloat16, float16 on a GPU without bfloat16, or float32 on the CPU. What depends on it, the compute dtype of
    4-bit weights and autocast, is set as well. A recipe with another dtype is returned as it is.

    Args:
        recipe: the recipe.
        saved: the recipe of the run folder, if it holds a run.
    """
    if recipe.model.dtype != "auto":
        return recipe
    if saved is not None:
        dtype = saved.model.dtype
    elif recipe.training.get("use_cpu"):
        dtype = "float32"
    else:
        dtype = "bfloat16" if not torch.cuda.is_available() or _supports_bf16() else "float16"
    quantization = recipe.quantization
    if quantization is not None:
        quantization = quantization.model_copy(update={"bnb_4bit_compute_dtype": dtype})
    autocast = {"bf16": dtype == "bfloat16", **({"fp16": False} if "fp16" in recipe.training else {})}
    return replace(
        recipe,
        model=recipe.model.model_copy(update={"dtype": dtype}),
        quantization=quantization,
        training=recipe.training | autocast,
    )


def _supports_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


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
    apple = " (Apple's are not supported)" if torch.backends.mps.is_available() else ""
    return (
        f"this machine has no GPU that PyTorch can use{apple}; to train on the CPU, which is slow, use "
        f'SET="{overrides}"'
    )


def find_old_gpu() -> str | None:
    """Return a message if the GPU is older than what PyTorch's builds for CUDA 13 support; None otherwise."""
    # Only builds for CUDA know compute capabilities.
    if torch.version.cuda is None or (capability := torch.cuda.get_device_capability()) >= OLDEST_CAPABILITY:
        return None
    found, oldest = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
    return (
        f"{torch.cuda.get_device_name()} has compute capability {found}; PyTorch 2.11 and newer have no kernels for "
        f"Pascal and Volta, only for {oldest} and newer. A T4 is new enough (on Kaggle, choose GPU T4 x2). To use the "
        "CPU: CUDA_VISIBLE_DEVICES= make train CPU=1"
    )


def find_device_problems(recipe: Recipe, num_processes: int) -> list[str]:
    """Return what this machine does not support of the recipe, each problem with the `SET=` that works here.

    Args:
        recipe: the recipe.
        num_processes: how many processes will run it on this machine.
    """
    recipe = resolve_dtype(recipe)
    problems = []
    training, use_cpu = recipe.training, bool(recipe.training.get("use_cpu"))
    autocasts_to_bf16 = training.get("bf16", True) is not False and not training.get("fp16")
    compute_dtype = recipe.model.dtype if recipe.quantization is None else recipe.quantization.bnb_4bit_compute_dtype
    uses_bf16 = autocasts_to_bf16 or "bfloat16" in (recipe.model.dtype, compute_dtype)
    if use_cpu:
        if training.get("bf16", True) is not False or training.get("fp16"):
            cpu_overrides = CPU_OVERRIDES if recipe.quantization is not None else CPU_OVERRIDES.rpartition(" ")[0]
            problems.append(f'training.use_cpu: training on a CPU needs float32; use SET="{cpu_overrides}"')
    elif (missing_gpu := find_missing_gpu(recipe)) is not None:
        problems.append(missing_gpu)
    elif (old_gpu := find_old_gpu()) is not None:
        problems.append(old_gpu)
    elif uses_bf16 and not _supports_bf16():
        problems.append(
            f"{torch.cuda.get_device_name()} does not support bfloat16; use float16 for matrix products and float32 "
            f'for all else, which does not overflow: SET="{NO_BF16_OVERRIDES}"'
        )
    elif num_processes > torch.cuda.device_count() and "LOCAL_WORLD_SIZE" not in os.environ:
        count = torch.cuda.device_count()
        problems.append(f"{num_processes} processes need a GPU each, but this machine has {count}; use GPUS={count}")
    if recipe.model.dtype == "float16" and (autocasts_to_bf16 or training.get("fp16") or compute_dtype != "float16"):
        problems.append(
            "model.dtype: found float16, which needs float16 as quantization.bnb_4bit_compute_dtype, and no autocast: "
            f'set training.bf16 and training.fp16 to false, or SET="{NO_BF16_OVERRIDES}"'
        )
    if recipe.model.device_map is not None and num_processes > 1:
        problems.append(
            "model.device_map: auto spreads one model over all GPUs, which conflicts with one process per GPU; set "
            "model.device_map=null or run without a launcher (GPUS=1)"
        )
    return problems


def visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]
