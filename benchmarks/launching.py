"""Run `hw3` as users do, on one GPU or through `accelerate launch`, and read the results from the run folder."""

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
from training_logs import read_loss_logs, seconds_per_step

from hw3.runs.run import Run

SHUTDOWN_TIMEOUT_SECONDS = 20  # between the launcher's SIGTERM to its processes and SIGKILL
POLL_SECONDS = 0.02


class CommandError(Exception):
    """The command failed or ran too long; the message is the first error in its output."""


def launch(
    arguments: list[str],
    log: Path,
    *,
    processes: int,
    accelerate: str = "ddp",
    timeout_seconds: float | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Run `python ARGUMENTS`, through `accelerate launch` if there are several processes.

    If there are more processes than GPUs, several launchers start them, each with all GPUs, as on several machines.
    NCCL treats the launchers as machines, and so several processes can use one GPU. Results and memory are those of as
    many GPUs as processes; times are not.

    Args:
        arguments: A file, or `-m` and a module, and its arguments.
        log: Where the output goes. Each further launcher writes to its own file beside it.
        processes: The number of processes of all launchers.
        accelerate: The name of a file in `accelerate_configs/`.
        timeout_seconds: The longest time that the command may take.
        environment: Variables added to this process's environment.

    Raises:
        CommandError: The command failed, or took longer than `timeout_seconds`.
        ValueError: The processes cannot be divided evenly among the GPUs.
    """
    gpus = torch.cuda.device_count() or processes
    if processes > gpus and processes % gpus:
        raise ValueError(f"{processes} processes cannot be divided evenly among {gpus} GPUs")
    machines = max(1, processes // gpus)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{accelerate}.yaml"]
        command += ["--num_processes", str(processes), "--main_process_port", "0" if machines == 1 else _free_port()]
    if machines > 1:
        command += ["--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
        command += ["--deepspeed_multinode_launcher", "standard"] if accelerate == "zero3" else []
    variables = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_SECONDS)} | (environment or {})
    log.parent.mkdir(parents=True, exist_ok=True)
    started, logs = [], []
    for rank in range(machines):
        options = ["--machine_rank", str(rank)] if machines > 1 else []
        # NCCL refuses two processes on one GPU, unless they seem to be on different machines.
        own = {"NCCL_HOSTID": f"machine-{rank}", "NCCL_SOCKET_IFNAME": "lo"} if machines > 1 else {}
        logs.append(log.with_suffix(f".{rank}.log" if rank else ".log"))
        with logs[-1].open("w", encoding="utf-8") as output:
            started.append(
                subprocess.Popen(
                    [*command, *options, *arguments], stdout=output, stderr=subprocess.STDOUT, env=variables | own
                )
            )
    failed, reason = _wait(started, None if timeout_seconds is None else time.monotonic() + timeout_seconds)
    if failed is not None:
        lines = logs[failed].read_text(encoding="utf-8").splitlines()
        errors = [line for line in lines if "rror" in line or "out of memory" in line or line.startswith("hw3")]
        raise CommandError(f"{reason}: {(errors or lines or ['no output'])[0][:300]}")


def _wait(started: list[subprocess.Popen], deadline: float | None) -> tuple[int | None, str]:
    """Wait for all processes; terminate all of them if one fails or the deadline passes.

    Returns:
        The index of the process that failed, None if all succeeded; and the reason of the failure.
    """
    failed, reason = None, ""
    while failed is None and any(process.returncode is None for process in started):
        time.sleep(POLL_SECONDS)
        for index, process in enumerate(started):
            if process.poll():
                failed, reason = index, f"exit status {process.returncode}"
                break
            if process.returncode is None and deadline is not None and time.monotonic() > deadline:
                failed, reason = index, "timed out"
                break
    if failed is not None:
        for process in started:
            process.terminate()  # a launcher that is killed instead would leave its processes on the GPUs
        for process in started:
            try:
                process.wait(2 * SHUTDOWN_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    return failed, reason


def _free_port() -> str:
    """Return a free port. One launcher chooses its own; several launchers need the same one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def train(
    recipe: str, overrides: list[str], run: Path, *, processes: int, resume: bool = False, **options: Any
) -> None:
    """Train into a run folder.

    Args:
        recipe: The recipe's file.
        overrides: `section.key=value`.
        run: The run folder.
        processes: The number of processes.
        resume: Resume the run in the folder; otherwise the folder is deleted first.
        options: Options of `launch`.

    Raises:
        CommandError: The run failed or timed out.
    """
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    arguments = ["-m", "hw3", "train", recipe, "--run", str(run), *overrides]
    launch(arguments, run.with_suffix(".log"), processes=processes, **options)


def sweep(run: Path, report: Path, *, processes: int = 1, **options: Any) -> dict[str, Any]:
    """Score the base model and all checkpoints of a run through `profile_eval.py`.

    Args:
        run: The run folder.
        report: Where `profile_eval.py` writes.
        processes: The number of processes.
        options: Options of `launch`.

    Returns:
        The report of `profile_eval.py`, with the times `started` and `finished` as `time.time()` gives them.

    Raises:
        CommandError: The command failed or timed out.
    """
    shutil.rmtree(
        run / "eval", ignore_errors=True
    )  # otherwise the entries of an earlier benchmark are not scored again
    started = time.time()
    arguments = [str(Path(__file__).with_name("profile_eval.py")), str(run), str(report), str(started)]
    launch(arguments, report.with_suffix(".log"), processes=processes, **options)
    return json.loads(report.read_text(encoding="utf-8")) | {"started": started, "finished": time.time()}


def read_run(run: Path, *, warmup_entries: int) -> dict[str, Any]:
    """Read the step strategy, seconds per step, losses and memory of a finished run from its folder.

    Args:
        run: The run folder.
        warmup_entries: Log entries to leave out of the seconds.
    """
    logs = read_loss_logs(run)
    seconds = seconds_per_step(logs[warmup_entries:])
    manifest = Run(run).read_manifest()
    session = manifest.sessions[-1].model_dump()
    return {
        "speed": manifest.speed.model_dump(),
        "layout": manifest.layout.model_dump(),
        "seconds_per_step": round(statistics.median(seconds), 4),
        "seconds_per_step_range": [round(min(seconds), 4), round(max(seconds), 4)],
        **{key: value for key, value in session.items() if key.endswith("_gib") or key == "seconds_capturing"},
        "losses": [entry["loss"] for entry in logs],
    }
