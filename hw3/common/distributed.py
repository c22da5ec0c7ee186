"""Helpers for commands that run in several processes.

A launcher (`accelerate launch` or `torchrun`) starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE. In
training, the Trainer handles all communication. Scoring and prediction use the functions below, which do nothing in a
single process.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hw3.common.errors import RunError, UserError, first_line

# A process that finishes first waits for the slowest one. If a process dies, its connections close and the others
# notice at once; this timeout is for a process that hangs.
PROCESS_GROUP_TIMEOUT = datetime.timedelta(hours=1)


def get_rank() -> int:
    """Return this process's rank among all processes of the command; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def get_local_rank() -> int:
    """Return this process's rank on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_world_size() -> int:
    """Return the number of processes of the command; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ensure_process_group(timeout: datetime.timedelta) -> None:
    """Initialize the gloo process group, unless there is one already.

    The group is destroyed only when Python exits. A gloo thread that releases a Python object after the group is
    destroyed would abort the process.

    Args:
        timeout: how long a process waits for the others in one operation.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timeout)
        atexit.register(torch.distributed.destroy_process_group)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Run the block in a process group, so that `gather_objects` works; only rank 0 prints."""
    if get_world_size() == 1:
        yield
        return
    # gloo also on GPUs: only Python objects are exchanged, no tensors. The group is created once per process, because
    # creating it again hangs on addresses that the first group left in the launcher's store.
    ensure_process_group(PROCESS_GROUP_TIMEOUT)
    with contextlib.ExitStack() as stack:
        if get_rank() != 0:
            devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        yield


def gather_objects(value: Any) -> list[Any]:
    """Return the values that all processes passed, in the order of their ranks, on every process.

    Raises:
        UserError: one of the values is a `UserError`; it is raised on every process.
    """
    values = [value]
    if get_world_size() > 1:
        values = [None] * get_world_size()
        torch.distributed.all_gather_object(values, value)
    for gathered in values:
        if isinstance(gathered, UserError):
            raise gathered
    return values


def shard_by_cost(costs: Sequence[float]) -> list[int]:
    """Return the indices of the items that this process handles, most expensive first.

    Items are sorted by falling cost and dealt out one by one. All processes sort alike, so every item belongs to
    exactly one process, and the shards cost about the same.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    return order[get_rank() :: get_world_size()]


def assert_same_across_ranks(values: dict[str, str]) -> None:
    """Check that all processes have read the same values.

    They differ where machines do not share a disk, or where their copies of a file differ.

    Args:
        values: what this process has read, by the name under which a user knows it.

    Raises:
        UserError: processes have read different values; the message names each of them.
    """
    first, *others = gather_objects(values)
    problems = [
        f"{name}: process {rank} reads {other[name]}, process 0 reads {first[name]}"
        for rank, other in enumerate(others, 1)
        for name in first
        if other[name] != first[name]
    ]
    if problems:
        raise UserError(
            "the processes do not work on the same run; put RUN, the code and the data on a disk that all machines "
            "share, or the same copy on each machine:",
            *problems,
        )


@contextlib.contextmanager
def explain_runtime_errors(out_of_memory_advice: str) -> Iterator[None]:
    """Raise `RunError` with a readable message where memory runs out or another process is lost.

    Args:
        out_of_memory_advice: how the user can reduce the memory that the command needs.

    Raises:
        RunError: memory ran out, or another process has ended or does not respond.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory: {first_line(error)[:300]}\n{out_of_memory_advice}") from error
    except RuntimeError as error:
        # PyTorch raises DistError for NCCL and for the store; gloo's errors are plain RuntimeErrors.
        if get_world_size() == 1 or not (isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)):
            raise
        raise RunError(
            "another process has ended or does not respond, so this process ends too; that process's message names the "
            "cause. Completed work is saved: run the same command again to continue. "
            f"({_first_sentence(error)})"
        ) from error


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error, without the `[file:line]` of PyTorch's source that it starts with."""
    return re.sub(r"^\[.*?\] ", "", first_line(error)[:300]).partition(". ")[0]
