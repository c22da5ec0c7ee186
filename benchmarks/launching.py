"""Runs `hw3` as users do, on one GPU or through `accelerate launch`, and reads what the run folder says of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from logs import logs_of, seconds_per_step

from hw3.runs.run_dir import read_manifest

STOPPING = 20  # seconds that processes have to end when they are told to


class RunEnded(Exception):
    """The command did not finish; the message is the last that it said."""


def launch(
    words: list[str],
    log: Path,
    *,
    processes: int,
    accelerate: str = "ddp",
    seconds: float | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Run `python WORDS`; one process goes without a launcher.

    More processes than the machine has GPUs are started by several launchers, each of which has all GPUs, as on several
    machines: NCCL takes them for that, and lets several processes use one GPU. Results and memory are those of as many
    GPUs; times are not.

    Args:
        words: a file, or `-m` and a module, and its arguments.
        log: what it says; of several launchers each has a file of its own beside it.
        processes: in all.
        accelerate: which file of `accelerate_configs/`.
        seconds: the longest that it may take.
        environment: added to this process's.

    Raises:
        RunEnded: it failed, or took longer.
        ValueError: the processes cannot share the GPUs evenly.
    """
    gpus = torch.cuda.device_count() or processes
    if processes > gpus and processes % gpus:
        raise ValueError(f"{processes} processes cannot share {gpus} GPUs evenly")
    machines = max(1, processes // gpus)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{accelerate}.yaml"]
        command += ["--num_processes", str(processes), "--main_process_port", "0" if machines == 1 else _free_port()]
    if machines > 1:
        command += ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
        command += ["--deepspeed_multinode_launcher", "standard"] if accelerate == "zero3" else []
    own = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOPPING)} | (environment or {})
    log.parent.mkdir(parents=True, exist_ok=True)
    started, logs = [], []
    for number in range(machines):
        rank = ["--machine_rank", str(number)] if machines > 1 else []
        apart = {"NCCL_HOSTID": f"machine-{number}", "NCCL_SOCKET_IFNAME": "lo"} if machines > 1 else {}
        logs.append(log.with_suffix(f".{number}.log" if number else ".log"))
        with logs[-1].open("w", encoding="utf-8") as said:
            started.append(
                subprocess.Popen([*command, *rank, *words], stdout=said, stderr=subprocess.STDOUT, env=own | apart)
            )
    failed, status = _wait(started, None if seconds is None else time.monotonic() + seconds)
    if failed is not None:
        lines = logs[failed].read_text(encoding="utf-8").splitlines()
        telling = [line for line in lines if "rror" in line or "out of memory" in line or line.startswith("hw3")]
        raise RunEnded(f"{status}: {(telling or lines or ['nothing said'])[0][:300]}")


def _wait(started: list[subprocess.Popen], deadline: float | None) -> tuple[int | None, str]:
    """Wait for all, and end all if one fails or is late.

    Returns:
        The number of the one that failed, None if all are done; and its status in words.
    """
    failed, status = None, ""
    while failed is None and any(process.returncode is None for process in started):
        time.sleep(0.02)
        for number, process in enumerate(started):
            if process.poll():
                failed, status = number, f"status {process.returncode}"
                break
            if process.returncode is None and deadline is not None and time.monotonic() > deadline:
                failed, status = number, "not done in time"
                break
    if failed is not None:
        for process in started:
            process.terminate()  # a launcher ends its processes; killed itself, it would leave them on the GPUs
        for process in started:
            try:
                process.wait(2 * STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
    return failed, status


def _free_port() -> str:
    """A port that nothing listens to; one launcher asks for its own, several need the same one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def train(recipe: str, overrides: list[str], run: Path, *, processes: int, go_on: bool = False, **options: Any) -> None:
    """Train into a run folder.

    Args:
        recipe: the recipe's file.
        overrides: `section.key=value`.
        run: the run folder.
        processes: in all.
        go_on: go on with the run that is there; otherwise it is deleted.
        options: of `launch`.

    Raises:
        RunEnded: it failed, or took longer than it may.
    """
    if not go_on:
        shutil.rmtree(run, ignore_errors=True)
    words = ["-m", "hw3", "train", recipe, "--run", str(run), *overrides]
    launch(words, run.with_suffix(".log"), processes=processes, **options)


def sweep(run: Path, report: Path, *, processes: int = 1, **options: Any) -> dict[str, Any]:
    """Score everything of a run anew by `sweep.py`; returns what that says, with `began` and `over`, in `time.time()`.

    Args:
        run: the run folder.
        report: where `sweep.py` writes.
        processes: in all.
        options: of `launch`.

    Raises:
        RunEnded: it failed, or took longer than it may.
    """
    shutil.rmtree(run / "eval", ignore_errors=True)  # of an earlier benchmark: nothing would be left to score
    began = time.time()
    words = [str(Path(__file__).with_name("sweep.py")), str(run), str(report), str(began)]
    launch(words, report.with_suffix(".log"), processes=processes, **options)
    return json.loads(report.read_text()) | {"began": began, "over": time.time()}


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
        **{key: value for key, value in session.items() if key.endswith("_gib") or key == "seconds_capturing"},
        "losses": [log["loss"] for log in logs],
    }
