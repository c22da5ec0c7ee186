"""A run with the CUDA-graph step that is killed and resumed ends with the bytes of a run without interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_runs import read_manifest
from helpers import ENVIRONMENT, hw3, read_losses

from hw3.runs.checkpoints import find_complete_checkpoints

pytestmark = pytest.mark.gpu

SETTINGS = ["training.max_steps=400", "training.save_steps=100"]
TIMEOUT_SECONDS = 180


def kill_after_first_checkpoint(command: list[str], run: Path) -> int:
    """Run a command until the run's first checkpoint is complete, and kill it; return its exit status."""
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (run / "checkpoint-100/COMPLETE.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode


def test_killed_and_resumed_run_ends_with_the_same_bytes(mini_gpu_recipe: Path, tmp_path: Path) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    hw3("train", mini_gpu_recipe, "--run", uninterrupted, *SETTINGS)
    command = [sys.executable, "-m", "hw3", "train", str(mini_gpu_recipe), "--run", str(killed), *SETTINGS]
    assert kill_after_first_checkpoint(command, killed) == -signal.SIGKILL
    assert find_complete_checkpoints(killed)[-1].step < 400
    hw3("train", mini_gpu_recipe, "--run", killed, *SETTINGS)
    for run in (uninterrupted, killed):
        assert read_manifest(run)["speed"]["cuda_graphs"], run
        assert [checkpoint.step for checkpoint in find_complete_checkpoints(run)] == [100, 200, 300, 400]
    assert read_losses(killed) == read_losses(uninterrupted)
    weights = [(run / "checkpoint-400/adapter_model.safetensors").read_bytes() for run in (uninterrupted, killed)]
    assert weights[0] == weights[1]
