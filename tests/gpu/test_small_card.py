"""Runs with little GPU memory: `speed: auto` takes what fits, and every failure has a message."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_runs import assert_trained, find_memory, read_manifest
from helpers import CHARACTERS, ENVIRONMENT, hw3, read_losses

from hw3.training.memory_estimate import GIB
from hw3.training.step_strategy import CUDA_CONTEXT_BYTES

pytestmark = pytest.mark.gpu

# Runs `hw3` with as much memory as a smaller GPU has. PyTorch reports this memory, and allocates no more.
RUN_ON_SMALL_GPU = """
import sys, torch
from hw3.cli import main
free, total = map(int, sys.argv[1:3])
torch.cuda.set_per_process_memory_fraction(free / torch.cuda.mem_get_info()[1])
torch.cuda.mem_get_info = lambda device=None: (free - torch.cuda.memory_reserved(device), total)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("uses_cuda_graphs", [True, False])
def test_auto_takes_what_fits_into_a_small_gpu(
    shape_recipe: Path, device: torch.device, tmp_path: Path, uses_cuda_graphs: bool
) -> None:
    """With too little memory for the dequantized base: the CUDA-graph step in 4 bits. With less: TRL's step."""
    context, run = int(CUDA_CONTEXT_BYTES), tmp_path / "run"
    sizes = [(total - context, total) for total in range(4 * GIB, context, -(2**26))]
    free, total = find_memory(shape_recipe, run, device, (uses_cuda_graphs, False), sizes)
    command = [sys.executable, "-c", RUN_ON_SMALL_GPU, str(free), str(total), "train", shape_recipe, "--run", run]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    session = assert_trained(run, cuda_graphs=uses_cuda_graphs, dequantized=False)
    assert session["peak_reserved_gib"] <= free / GIB


@contextlib.contextmanager
def limited_gpu(device: torch.device, limit_bytes: float) -> Iterator[None]:
    """Let PyTorch allocate no more than `limit_bytes` inside the block. Nothing can see the limit beforehand."""
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit_bytes / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def write_long_rows(path: Path, count: int) -> Path:
    """Write rows of about 400 tokens."""
    rows = [
        {"id": f"long-{number}", "instruction": CHARACTERS[number % 20 :][:10] * 35, "output": CHARACTERS[:10] * 4}
        for number in range(count)
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def test_step_that_runs_out_of_memory_continues_with_smaller_micro_batches(
    gemma_recipe: Path, device: torch.device, tmp_path: Path
) -> None:
    """The limit lies between the memory of a step with one row at once and that of a step with eight."""
    rows = write_long_rows(tmp_path / "rows.json", 24)
    settings = [f"data.train={rows}", "data.max_length=512", "training.max_steps=6", "speed=plain"]
    one_by_one = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=8"]
    hw3("train", gemma_recipe, "--run", tmp_path / "one", *settings, *one_by_one)
    hw3("train", gemma_recipe, "--run", tmp_path / "eight", *settings)
    (small,), (large,) = (read_manifest(tmp_path / run)["sessions"] for run in ("one", "eight"))
    assert large["peak_steps_reserved_gib"] > 1.5 * small["peak_steps_reserved_gib"]
    limit_gib = (small["peak_steps_reserved_gib"] + large["peak_steps_reserved_gib"]) / 2
    with limited_gpu(device, limit_gib * GIB):
        _, messages = hw3("train", gemma_recipe, "--run", tmp_path / "limited", *settings)
    assert "out of memory with 8 rows x 1; continuing with 4 x 2" in messages
    layout = read_manifest(tmp_path / "limited")["layout"]
    assert layout["rows_per_device"] in (1, 2, 4) and layout["rows_per_device"] * layout["accumulation"] == 8
    expected = read_losses(tmp_path / "one")
    for step, (loss, tokens) in read_losses(tmp_path / "limited").items():
        assert (loss, tokens) == (pytest.approx(expected[step][0], rel=0.02), expected[step][1]), step


@pytest.mark.xdist_group("finished run")  # the tests share a run, so one process runs all of them
@pytest.mark.parametrize("command", ["train", "check", "eval", "predict", "predict --text", "export", "pack", "verify"])
def test_command_without_enough_memory_reports_it_in_one_message(
    gemma_recipe: Path, finished_gpu_run: Path, device: torch.device, tmp_path: Path, command: str
) -> None:
    """Not even the base model fits: status 1 and what would help, not a traceback."""
    run = shutil.copytree(finished_gpu_run, tmp_path / "run")
    arguments = {
        "train": [gemma_recipe, "--run", tmp_path / "new"],
        "check": [gemma_recipe, "--run", tmp_path / "new"],
        "eval": [run, "--data", gemma_recipe.parent.parent / "train.json"],
        "predict": [run, "--checkpoint", "checkpoint-4"],
        "predict --text": [run, "--text", "甲乙"],
        "export": [run, "--output", tmp_path / "exported"],
        "pack": [run, "--output", tmp_path / "packed"],
        "verify": [run],
    }[command]
    with limited_gpu(device, 2**20):
        # `hw3 check` prints what it found, and a line in place of the time.
        output, messages = hw3(command.split()[0], *arguments, expected=0 if command == "check" else 1)
    assert "out of memory" in output + messages
    assert "Traceback" not in output + messages
