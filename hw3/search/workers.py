"""Several processes that train trials of one search on this machine, one for each GPU."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hw3.common.errors import RunError
from hw3.common.signals import StoppedBySignal
from hw3.modeling.devices import visible_gpus
from hw3.search.search import TrialReporter, close_search
from hw3.search.study import open_study
from hw3.search.trial_recipe import TrialRecipes

POLL_SECONDS = 1.0
LOG_LINES_SHOWN = 10

logger = logging.getLogger(__name__)


def run_workers(recipes: TrialRecipes, folder: Path, storage: str | None, workers: int, command: Sequence[str]) -> int:
    """Start processes that train trials, report what they finish, and choose the winner.

    Args:
        recipes: the recipes of the trials.
        folder: the search's folder.
        storage: where Optuna stores the trials; None for a journal file in the folder.
        workers: number of processes.
        command: the arguments of `hw3` for one process, without `--role`.

    Returns:
        0; 1 if a trial failed; 2 if the recipes are wrong, which another process has reported.

    Raises:
        UserError: folder or storage are wrong.
        RunError: the processes ended before the search was complete.
    """
    # In a process of its own: PyTorch would keep memory of the first GPU.
    if status := subprocess.run([*_hw3(command), "--role", "check"]).returncode:
        return status
    search = open_study(recipes, folder, storage)
    reporter = TrialReporter(search)
    logs = [folder / f"worker-{number}.log" for number in range(workers)]
    processes = [_start(command, log, number, workers) for number, log in enumerate(logs)]
    logger.info(f"{workers} processes train; their notices are in {folder}/worker-*.log")
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
            reporter.report()
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, StoppedBySignal) else signal.SIGTERM
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        for process in processes:
            process.wait()
        raise
    reporter.report()
    for process, log in zip(processes, logs, strict=True):
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
            logger.error("\n".join([f"{log}: the process ended with status {process.returncode}:", *lines]))
    if not search.is_finished():
        raise RunError(f"{folder}: the processes ended before the search; run the same command to resume")
    return close_search(search)


def _hw3(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "hw3", *command]


def _start(command: Sequence[str], log: Path, number: int, workers: int) -> subprocess.Popen[bytes]:
    """Start a process with its share of the cores, on a GPU of its own if there is one."""
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), **os.environ}
    if devices := visible_gpus():
        environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    with log.open("ab") as output:
        # A process stops when its standard input ends, which is when this process ends for any reason.
        return subprocess.Popen(
            [*_hw3(command), "--role", "worker"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
        )


def stop_with_parent() -> None:
    """Stop as by SIGTERM, after a complete checkpoint, when the process that started this one has ended."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is written; not `sys.stdin.read`, whose lock Python needs to exit
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
