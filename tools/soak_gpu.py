"""`tools/soak.py --gpu`: commands on a GPU, in processes that are forked from one that never uses it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

# Overrides of the recipe in tests/helpers.py, so that `speed: auto` takes the CUDA-graph step with 4-bit weights.
TRAINING_OVERRIDES = [
    "training.use_cpu=false",
    "training.bf16=true",
    "model.dtype=bfloat16",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
    "lora.lora_dropout=0.0",
]
ENVIRONMENT = {
    # PyTorch then counts GPUs with NVML. By default it would use CUDA, which forked processes could no longer use.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # A pool of compiling processes outlives a command that ends without Python's exit handlers, as here.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def describe_gpu() -> tuple[str, tuple[int, int]]:
    """Return the GPU's name and compute capability, read in a process of its own.

    Raises:
        SystemExit: there is no GPU.
    """
    code = "import json, torch; print(json.dumps([torch.cuda.get_device_name(), torch.cuda.get_device_capability()]))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("--gpu: PyTorch finds no GPU")
    name, (major, minor) = json.loads(done.stdout)
    return name, (major, minor)


@contextlib.contextmanager
def without_cuda_context(capability: tuple[int, int]) -> Iterator[None]:
    """Keep imports in the block from creating a CUDA context, with which forked processes could not use CUDA.

    bitsandbytes 0.50.2 (cuda_specs.py) reads the compute capability when it is imported.

    Args:
        capability: of the GPU.
    """
    os.environ |= ENVIRONMENT
    import torch

    read_capability = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = read_capability
    if torch.cuda.is_initialized():
        raise SystemExit("--gpu: an import has created a CUDA context, so that forked processes cannot use the GPU")
