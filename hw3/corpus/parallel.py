"""Process chunks of sentence pairs in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PAIRS_PER_CHUNK = 20_000
_MAX_PROCESSES = 8  # more processes only wait for the one that collects the results


def split_into_chunks(items: Sequence[Item]) -> list[Sequence[Item]]:
    """Return consecutive parts of at most `PAIRS_PER_CHUNK` items."""
    return [items[start : start + PAIRS_PER_CHUNK] for start in range(0, len(items), PAIRS_PER_CHUNK)]


def parallel_map(function: Callable[[Sequence[Item]], Result], chunks: Sequence[Sequence[Item]]) -> Iterator[Result]:
    """Yield `function(chunk)` for every chunk in order, computed by several processes if there are several chunks."""
    processes = min(len(chunks), os.cpu_count() or 1, _MAX_PROCESSES)
    if processes < 2:
        yield from map(function, chunks)
        return
    # Not forked: rensa's threads do not survive a fork, and the child process would wait for them forever.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_initialize_process, initargs=(function,)) as pool:
        # If the caller stops early, closing this iterator cancels the chunks that have not started.
        yield from pool.map(_call_process_function, chunks)


_process_function: Callable[[Any], Any] | None = None


def _initialize_process(function: Callable[[Any], Any]) -> None:
    """Store the function in a new process, so that its bound arguments are sent once and not with every chunk."""
    global _process_function
    # Ctrl-C reaches every process of the terminal. Only the main process handles it, and then ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _process_function = function


def _call_process_function(chunk: Any) -> Any:
    assert _process_function is not None, "`_initialize_process` runs first"
    return _process_function(chunk)
