"""`benchmarks/small_gpus.py` reads from the output of commands whether a run fits."""

from typing import Any

import pytest
from small_gpus import describe_outcome, read_check

CHECKED = """speed: auto
memory per GPU       total      weights
auto              5.96 GiB     5.38 GiB
plain             5.96 GiB     5.38 GiB
speed auto: TRL's own step, because the CUDA-graph step needs 8.4 GiB
"""


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("  about 5.96 GiB per GPU", "fits"),
        ("  It fits, but leaves only 0.84 GiB of 7.40 GiB free", "fits barely"),
        ("  This is more than the free memory. Set speed=lean", "does not fit"),
    ],
)
def test_read_check_returns_the_verdict_and_the_estimate(line: str, verdict: str) -> None:
    found = read_check({"command": "check", "status": 0, "output": CHECKED + line})
    assert found == {"check": verdict, "estimate_gib": 5.96, "time_not_known": None}


@pytest.mark.parametrize(
    ("status", "output", "outcome"),
    [
        (0, "speed auto: the CUDA-graph step", "fits"),
        (0, "out of memory with 8 rows x 1; continuing with 4 x 2", "fits in another way"),
        (0, "speed auto: the CUDA-graph step\nspeed auto: TRL's own step", "fits in another way"),
        (1, "hw3: out of memory: CUDA out of memory", "refused"),
        (1, "Traceback\nOutOfMemoryError: CUDA out of memory", "failed"),
        (1, "another error", "failed"),
    ],
)
def test_describe_outcome_of_training(status: int, output: str, outcome: str) -> None:
    result: dict[str, Any] = {"command": "train", "status": status, "output": output}
    assert describe_outcome(result) == outcome
