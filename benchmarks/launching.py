"""Runs `hw3 train` as users do, on one GPU or through `accelerate launch`, and reads what the run folder says of it."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from logs import logs_of, seconds_per_step

from hw3.run_folder import read_manifest

STOPPING = 20  # seconds that processes have to end when they are told to


class RunEnded(Exception):
    """The run did not finish; the message is the last that it said."""


def train(
    recipe: str, overrides: list[str], run: Path, *, gpus: int, accelerate: str = "ddp", seconds: float | None = None
) -> None:
    """Train into a new run folder; one GPU goes without a launcher.

    Args:
        recipe: the recipe's file.
        overrides: `section.key=value`.
        run: the run folder; what is there is deleted.
        gpus: processes.
        accelerate: which file of `accelerate_configs/`.
        seconds: the longest that it may take.

    Raises:
        RunEnded: it failed, or took longer.
    """
    shutil.rmtree(run, ignore_errors=True)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{accelerate}.yaml"]
    launcher += ["--num_processes", str(gpus), "--main_process_port", "0"]
    command = [sys.executable, *(launcher if gpus > 1 else []), "-m", "hw3", "train", recipe, "--run", str(run)]
    run.parent.mkdir(parents=True, exist_ok=True)
    said = run.with_suffix(".log")
    with said.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, *overrides],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOPPING)},
        )
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"not done in {seconds:.0f} s"
            process.terminate()  # the launcher ends its processes; killed itself, it would leave them on the GPUs
            try:
                process.wait(2 * STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
    if status != 0:
        lines = said.read_text(encoding="utf-8").splitlines()
        telling = [line for line in lines if "rror" in line or "out of memory" in line or line.startswith("hw3")]
        raise RunEnded(f"{status}: {(telling or lines or ['nothing said'])[0][:300]}")


def figures(run: Path, *, warm_up: int) -> dict[str, Any]:
    """What a finished run says of itself: seconds a step, losses, memory, how its steps were made.

    Args:
        run: the run folder.
        warm_up: log entries to leave out of the seconds.
    """
    logs = logs_of(run)
    windows = seconds_per_step(logs[warm_up:])
    manifest = read_manifest(run)
    session = manifest["sessions"][-1]
    return {
        "speed": manifest["speed"],
        "layout": manifest["layout"],
        "seconds_per_step": round(statistics.median(windows), 4),
        "seconds_per_step_range": [round(min(windows), 4), round(max(windows), 4)],
        **{key: value for key, value in session.items() if key.startswith("peak") or key == "seconds_capturing"},
        "losses": [log["loss"] for log in logs],
    }
