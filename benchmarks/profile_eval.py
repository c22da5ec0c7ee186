"""Run `hw3 eval RUN` and time its parts. `evaluation.py` and `parallel_inference.py` start it.

python benchmarks/profile_eval.py RUN OUTPUT.json STARTED     # STARTED: time.time() when this process was started
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hw3.cli import main
from hw3.common.gc_control import gc_paused

with gc_paused():  # `hw3.cli` imports them so, which is faster
    from hw3.common import distributed
    from hw3.evaluation import evaluate, score_tasks, scorer
    from hw3.modeling import adapter_io
    from hw3.modeling.adapter_slot import AdapterSlot

# The functions that make up each part: (module or class, name).
PARTS = {
    "reading the tokenizer and hashing the base model": [(evaluate, "open_run")],
    "loading the base model and verifying its output head": [
        (score_tasks, "load_slot"),
        (score_tasks, "verify_output_head"),
    ],
    "waiting for adapters": [(adapter_io.AdapterPrefetcher, "get")],
    "copying adapters into the base model": [(AdapterSlot, "set")],
    "scoring": [(scorer, "score_rows")],
    "printing tables": [(evaluate, "print_results")],
}
BACKGROUND_PARTS = {
    "computing statistics and writing results after each entry": [(score_tasks._EntryRecorder, "_add")],
    "reading and hashing adapters": [(adapter_io, "read_adapter")],
}


def timed(work: Callable[..., Any], times: list[float], depth: list[int]) -> Callable[..., Any]:
    """Wrap a function so that its seconds are appended to `times`.

    Args:
        work: The function.
        times: Where to append.
        depth: One number, shared by the functions of one part: how many of them are running. A call from within the
            same part is not counted again.
    """

    def run(*arguments: Any, **options: Any) -> Any:
        depth[0] += 1
        start = time.perf_counter()
        try:
            return work(*arguments, **options)
        finally:
            depth[0] -= 1
            if not depth[0]:
                times.append(time.perf_counter() - start)

    return run


def record_distributed_part(marks: list[float]) -> None:
    """Append the time when the base model is loaded and when the last entry is scored.

    The processes share the work between these two moments. `Scorer` is made at the first, and the prefetcher of
    adapters is closed at the second.
    """
    make_scorer, close_prefetcher = scorer.Scorer.__init__, adapter_io.AdapterPrefetcher.close

    def init(*arguments: Any) -> None:
        marks.append(time.perf_counter())
        make_scorer(*arguments)

    def close(*arguments: Any) -> None:
        close_prefetcher(*arguments)
        marks.append(time.perf_counter())

    scorer.Scorer.__init__, adapter_io.AdapterPrefetcher.close = init, close


def profile(run: str, output: Path, started: float) -> int:
    """Score a run and write the seconds of each part; return the exit status of `hw3 eval`."""
    seconds: dict[str, list[float]] = {"starting Python and importing": [time.time() - started]}
    marks: list[float] = []
    record_distributed_part(marks)
    for part, functions in (PARTS | BACKGROUND_PARTS).items():
        depth = [0]
        for owner, name in functions:
            setattr(owner, name, timed(getattr(owner, name), seconds.setdefault(part, []), depth))
    status = main(["eval", run])
    ended = time.time()
    background = {part: sum(seconds.pop(part)) for part in BACKGROUND_PARTS}
    parts = {part: sum(times) for part, times in seconds.items()}
    report = {"ended": ended, "parts": parts, "background": background, "distributed": marks[-1] - marks[0]}
    if distributed.get_rank() == 0:
        output.write_text(json.dumps(report), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(profile(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])))
