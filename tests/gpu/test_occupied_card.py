"""A run beside another process that occupies the GPU. Nothing else may use the GPU at the same time."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_runs import assert_trained, find_memory
from helpers import ENVIRONMENT, hw3

from hw3.training.memory_estimate import GIB
from hw3.training.step_strategy import HEADROOM_FRACTION

pytestmark = pytest.mark.gpu

# Occupies the GPU until its standard input is closed.
OCCUPY = """
import sys, torch
occupied = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("occupied", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def occupied_gpu(free_bytes: int) -> Iterator[None]:
    """Let another process occupy the GPU inside the block, so that this one has `free_bytes`.

    They include what this process has reserved already, as in the plan of a run.
    """
    torch.cuda.empty_cache()
    command = [sys.executable, "-c", OCCUPY, str(free_bytes - torch.cuda.memory_reserved())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"occupied\n"
        try:
            yield
        finally:
            process.stdin.close()


@pytest.mark.parametrize("uses_cuda_graphs", [True, False])
def test_auto_takes_what_fits_into_the_free_memory(
    gemma_recipe: Path, device: torch.device, tmp_path: Path, uses_cuda_graphs: bool
) -> None:
    """With too little memory for the dequantized base: the CUDA-graph step in 4 bits. With less: TRL's step."""
    total, run = torch.cuda.mem_get_info(device)[1], tmp_path / "run"
    most = int(HEADROOM_FRACTION * total) + 2 * GIB
    sizes = [(free, total) for free in range(most, 0, -(2**26))]
    free, _ = find_memory(gemma_recipe, run, device, (uses_cuda_graphs, False), sizes)
    with occupied_gpu(free):
        hw3("train", gemma_recipe, "--run", run)
    assert_trained(run, cuda_graphs=uses_cuda_graphs, dequantized=False)
