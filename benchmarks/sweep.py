"""`hw3 eval RUN` with a clock at its parts: where the time of a sweep goes. Started by `evaluation.py`.

python benchmarks/sweep.py RUN OUT.json BEGAN     # BEGAN: time.time() when it was started
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hw3.cli import main
from hw3.common.gc_control import uncollected

with uncollected():  # as `hw3.cli` imports them
    from hw3.common import distributed
    from hw3.evaluation import evaluate, scorer
    from hw3.modeling import adapter_io
    from hw3.modeling.adapter_slot import AdapterSlot

PARTS = {
    "opening: tokenizer read, base hashed": [(evaluate, "open_run")],
    "loading the base, checking its head": [(evaluate, "load_for_inference"), (evaluate, "check_head")],
    "waiting for adapters to be read": [(adapter_io.ReadAhead, "take")],
    "putting adapters into the base": [(AdapterSlot, "put")],
    "scoring": [(scorer, "score_rows")],
    "tables": [(evaluate, "print_results")],
}
# In threads beside all this.
BESIDE = {
    "statistics, results written after each entry": [(evaluate, "_keep")],
    "reading and hashing adapters": [(adapter_io, "read_adapter")],
}


def clocked(work: Callable[..., Any], times: list[float], inside: list[int]) -> Callable[..., Any]:
    """The same work, its seconds added to a list; calls of the same part from within count once."""

    def run(*arguments: Any, **options: Any) -> Any:
        inside[0] += 1
        start = time.perf_counter()
        try:
            return work(*arguments, **options)
        finally:
            inside[0] -= 1
            if not inside[0]:
                times.append(time.perf_counter() - start)

    return run


# From the loaded base to the last entry, the work that processes share out.
shared: list[float] = []
begin, close = scorer.Scorer.__init__, adapter_io.ReadAhead.close


def begun(*arguments: Any) -> None:
    """The scorer is made once the base is loaded."""
    shared.append(time.perf_counter())
    begin(*arguments)


def closed(*arguments: Any) -> None:
    """Reading ahead ends with the last entry."""
    close(*arguments)
    shared.append(time.perf_counter())


scorer.Scorer.__init__, adapter_io.ReadAhead.close = begun, closed
found: dict[str, list[float]] = {"starting Python, imports": [time.time() - float(sys.argv[3])]}
for part, places in (PARTS | BESIDE).items():
    inside = [0]
    for owner, name in places:
        setattr(owner, name, clocked(getattr(owner, name), found.setdefault(part, []), inside))
status = main(["eval", sys.argv[1]])
ended = time.time()
beside = {part: sum(found.pop(part)) for part in BESIDE}
parts = {part: sum(times) for part, times in found.items()}
report = {"ended": ended, "parts": parts, "beside": beside, "shared": shared[-1] - shared[0]}
if distributed.rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(report))
sys.exit(status)
