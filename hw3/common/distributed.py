"""The processes of one command: which one this is, work shared out among them, and what is said when one ends.

A launcher (`accelerate launch`, `torchrun`) starts them and sets RANK, LOCAL_RANK and WORLD_SIZE. Training leaves their
collectives to the Trainer; scoring and prediction use the few functions here, which do nothing with one process.
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

from hw3.common.errors import RunFailed, UserError, first_line

# The first to be done waits for the slowest one's share. A process that dies closes its connections, which the others
# notice at once: this is for one that hangs.
PATIENCE = datetime.timedelta(hours=1)


def rank() -> int:
    """This process's number among all of the command; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Processes of the command; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def connect(timeout: datetime.timedelta) -> None:
    """Connect the processes by gloo, if they are not connected yet.

    They part as Python ends, and no later: a thread of gloo's that lets go of a Python object then aborts the process.

    Args:
        timeout: how long one waits for another.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timeout)
        atexit.register(torch.distributed.destroy_process_group)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Connect the processes for `gather`; only the first one prints."""
    if world_size() == 1:
        yield
        return
    # Python objects travel, no tensors: gloo, on GPUs as well. Once a process: whoever joins again after leaving finds
    # addresses of the first time in the launcher's store, and hangs.
    connect(PATIENCE)
    with contextlib.ExitStack() as stack:
        if rank() != 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def gather(value: Any) -> list[Any]:
    """What every process has given here, by rank, on every process.

    Raises:
        UserError: one of them has given a `UserError`; all end with it.
    """
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        torch.distributed.all_gather_object(values, value)
    for one in values:
        if isinstance(one, UserError):
            raise one
    return values


def own_share(costs: Sequence[float]) -> list[int]:
    """Indices of the items that this process takes: by falling cost, dealt out one by one.

    Every process draws the same order, so that the shares are of like cost and together hold each item once.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    return order[rank() :: world_size()]


def check_same(values: dict[str, str]) -> None:
    """Refuse to go on where processes have read different things: machines without a common disk, copies that differ.

    Args:
        values: what was read, by the name that a user knows it by.

    Raises:
        UserError: names what differs.
    """
    first, *others = gather(values)
    problems = [
        f"{name}: process {number} reads {other[name]}, process 0 {first[name]}"
        for number, other in enumerate(others, 1)
        for name in first
        if other[name] != first[name]
    ]
    if problems:
        raise UserError(
            "the processes do not work on the same run; RUN, the code and the data must be on a disk that all machines "
            "share, or the same on each:",
            *problems,
        )


@contextlib.contextmanager
def failures_named(if_out_of_memory: str) -> Iterator[None]:
    """Say in words what ends a process through no mistake of its own: memory, or another process's end.

    Args:
        if_out_of_memory: what would need less.

    Raises:
        RunFailed: memory ran out, or another process has ended or does not answer.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailed(f"out of memory: {first_line(error)[:300]}\n{if_out_of_memory}") from error
    except RuntimeError as error:
        # PyTorch has a class for NCCL's and the store's errors; gloo's come as they are.
        if world_size() == 1 or not (isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)):
            raise
        raise RunFailed(
            "another process has ended or does not answer, so this one ends too; what the other one says is the cause. "
            f"What was complete before is kept: the same command goes on from there. ({_first_sentence(error)})"
        ) from error


def _first_sentence(error: BaseException) -> str:
    """Without the place in PyTorch's own source that errors begin with."""
    return re.sub(r"^\[.*?\] ", "", first_line(error)[:300]).partition(". ")[0]
