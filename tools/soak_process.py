"""Processes of `tools/soak.py` that run a command of `hw3`, and the faults that happen to them."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # of sys.addaudithook
MAX_COMMAND_SECONDS = 600


@dataclass(frozen=True)
class Fault:
    """What happens to one attempt of a command.

    Attributes:
        kind: `kill`, `stop`, `disk_full`, `file_size_limit`, `bit_flip` or `second_writer`.
        moment: how much of the command has been done by then, from 0 to 1.
        by_time: whether the moment counts seconds, else accesses to files.
        number: the signal of `stop`; the bytes that can still be written; what seeds the place of the flipped bit.
    """

    kind: str
    moment: float
    by_time: bool = False
    number: int = 0


@dataclass(frozen=True)
class Attempt:
    """How one process ended.

    Attributes:
        status: the exit status; minus the number of the signal that ended it.
        text: standard output and standard error.
    """

    status: int
    text: str


@dataclass
class Command:
    """A command of `hw3` with the lengths of its reference, which scale the moments of faults.

    Attributes:
        name: as in the log.
        arguments: the arguments of `hw3` in a round's folder.
        flip_in: pattern of the files, in a round's folder, in which a bit may be flipped before the command is run.
        delete_if_damaged: folder in a round's folder that the command's message advises to delete.
        num_events: accesses to files.
        seconds: the duration.
    """

    name: str
    arguments: list[str]
    flip_in: str | None = None
    delete_if_damaged: str | None = None
    num_events: int = 0
    seconds: float = 0.0

    def draw_faults(self, draw: random.Random, kinds: list[str]) -> list[Fault]:
        """Draw up to three faults."""
        allowed = [kind for kind in kinds if kind != "bit_flip" or self.flip_in]
        return [self._draw_fault(draw, draw.choice(allowed)) for _ in range(draw.choice([0, 1, 1, 2, 2, 3]))]

    def _draw_fault(self, draw: random.Random, kind: str) -> Fault:
        number = {"stop": int(draw.choice(STOP_SIGNALS)), "bit_flip": draw.getrandbits(30)}.get(
            kind, draw.choice([0, 1, 4096, draw.randrange(200_000)])
        )
        return Fault(kind, round(draw.random(), 4), kind in ("kill", "second_writer") and draw.random() < 0.5, number)


class Process:
    """A forked process that runs `hw3`, in a process group of its own.

    Args:
        arguments: the arguments of `hw3`.
        folder: the folder whose file accesses are counted.
        fault: what happens at an access to a file.
        fault_event: number of that access, from 1; 0 for none.
        events_file: gets the number of accesses at the end.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        fault: Fault | None = None,
        fault_event: int = 0,
        events_file: Path | None = None,
    ) -> None:
        self._reader, writer = os.pipe()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                os.dup2(writer, 1)
                os.dup2(writer, 2)
                sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
                sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", buffering=1) for number in (1, 2))
                _run_child(arguments, folder, fault, fault_event, events_file)
            except BaseException:
                traceback.print_exc()
                os._exit(70)
        os.close(writer)

    def wait(self, kill_after: float | None = None) -> Attempt:
        """Return how the process ended. After `kill_after` seconds it is killed."""
        chunks: list[bytes] = []
        limit = MAX_COMMAND_SECONDS if kill_after is None else kill_after
        while True:
            remaining = self.started + limit - time.monotonic()
            ready, _, _ = select.select([self._reader], [], [], max(0.0, min(remaining, 0.2)))
            if ready:
                chunk = os.read(self._reader, 65536)
                chunks.append(chunk)
                if not chunk:
                    break
            elif remaining <= 0:
                os.kill(self.pid, signal.SIGKILL)
                limit = MAX_COMMAND_SECONDS
                break
            elif os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break  # processes that it has started may keep the pipe open
        _, status = os.waitpid(self.pid, 0)
        os.close(self._reader)
        text = b"".join(chunks).decode(errors="replace")
        return Attempt(os.waitstatus_to_exitcode(status), text)

    def has_left_processes(self) -> bool:
        """Return whether processes that it has started still run; end them."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def _run_child(
    arguments: list[str], folder: Path, fault: Fault | None, fault_event: int, events_file: Path | None
) -> None:
    import torch

    from hw3.cli import main

    torch.set_num_threads(1)
    count = 0
    prefix = str(folder)

    def count_access(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in FILE_EVENTS or not str(values[0]).startswith(prefix):
            return
        count += 1
        if fault is not None and count == fault_event:
            _strike(fault, folder)

    sys.addaudithook(count_access)
    status = main(arguments)
    if events_file is not None:
        events_file.write_text(str(count), encoding="utf-8")
    sys.stdout.flush()
    os._exit(status)


def _strike(fault: Fault, folder: Path) -> None:
    """Let a fault happen to this process."""
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), fault.number)
    elif fault.kind == "file_size_limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.number, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif fault.kind == "disk_full":
        disk = os.statvfs(folder)
        size = disk.f_bavail * disk.f_frsize - fault.number
        with (folder.parent / "ballast").open("wb") as file:
            if size > 0:
                os.posix_fallocate(file.fileno(), 0, size)


def in_child(function: Callable[[], None]) -> None:
    """Call a function in a forked process, because threads that PyTorch starts do not survive a fork."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except Exception:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the base model cannot be written")


def import_packages() -> None:
    """Import what the commands import, so that forked processes start at once."""
    import rensa  # noqa: F401

    import hw3

    for module in pkgutil.walk_packages(hw3.__path__, "hw3."):
        if not module.name.endswith("__main__"):  # it would run a command
            with contextlib.suppress(ImportError):  # an optional package is missing
                importlib.import_module(module.name)


def run_in_children(functions: Sequence[Callable[[], int]]) -> int:
    """Call functions at the same time, each in a forked process; return the sum of their results."""
    pids = []
    try:
        for function in functions:
            pids.append(os.fork())
            if pids[-1] == 0:
                try:
                    os._exit(function())
                except SystemExit as stop:  # a signal
                    os._exit(int(stop.code or 0))
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
        return sum(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids)
    except SystemExit:  # a signal; the processes leave their folders as this one does
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        raise
