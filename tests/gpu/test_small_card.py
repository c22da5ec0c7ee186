"""Runs on a GPU whose memory is occupied or limited: `speed: auto` takes what fits, and every failure has a message."""

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
from gpu_runs import read_manifest
from helpers import CHARACTERS, ENVIRONMENT, hw3, read_losses

from hw3.config.recipe import load_recipe
from hw3.training.memory_estimate import GIB
from hw3.training.plan import plan_run
from hw3.training.step_strategy import StepStrategy, choose_step_strategy

pytestmark = pytest.mark.gpu

SEARCH_STEP_BYTES = 2**26


# Occupies the GPU until its standard input is closed.
OCCUPY = """
import sys, torch
occupied = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("occupied", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def occupied_gpu(free_bytes: int) -> Iterator[None]:
    """Let another process occupy the GPU inside the block, so that only `free_bytes` are free."""
    torch.cuda.empty_cache()
    command = [sys.executable, "-c", OCCUPY, str(free_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"occupied\n"
        try:
            yield
        finally:
            process.stdin.close()


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


def find_free_bytes(recipe_file: Path, run: Path, device: torch.device, settings: tuple[bool, bool]) -> int:
    """Return the most free memory with which `speed: auto` chooses (CUDA graphs, dequantized)."""
    workload = plan_run(load_recipe(recipe_file), run, 1).workload
    total = torch.cuda.mem_get_info(device)[1]

    def choose(free: int) -> StepStrategy:
        return choose_step_strategy(workload, device, (free, total))

    for free in range(total // 4, 0, -SEARCH_STEP_BYTES):
        strategy = choose(free)
        if (strategy.cuda_graphs, strategy.dequantized) == settings:
            return free
    raise AssertionError(f"no amount of free memory lets `speed: auto` choose {settings}")


@pytest.mark.parametrize("uses_cuda_graphs", [True, False])
def test_auto_takes_what_fits_into_the_free_memory(
    shape_recipe: Path, device: torch.device, tmp_path: Path, uses_cuda_graphs: bool
) -> None:
    """With too little memory for the dequantized base: the CUDA-graph step in 4 bits. With less: TRL's step."""
    free_bytes = find_free_bytes(shape_recipe, tmp_path / "run", device, (uses_cuda_graphs, False))
    with occupied_gpu(free_bytes):
        hw3("train", shape_recipe, "--run", tmp_path / "run")
    manifest = read_manifest(tmp_path / "run")
    assert (manifest["speed"]["cuda_graphs"], manifest["speed"]["dequantized"]) == (uses_cuda_graphs, False)
    (session,) = manifest["sessions"]
    assert session["to_step"] == 12 and len(read_losses(tmp_path / "run")) == 12


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
