"""What a run logged, as its last checkpoint keeps it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from hw3.runs.checkpoints import complete_checkpoints


def logs_of(run: Path) -> list[dict[str, Any]]:
    """The lines with a loss, in order; each has `step` and `train_runtime`, seconds since training began."""
    state = json.loads((complete_checkpoints(run)[-1].path / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


def seconds_per_step(logs: list[dict[str, Any]]) -> list[float]:
    """Of each stretch between two lines."""
    return [
        (later["train_runtime"] - earlier["train_runtime"]) / (later["step"] - earlier["step"])
        for earlier, later in itertools.pairwise(logs)
    ]


def loss_differences(losses: list[float], others: list[float]) -> dict[str, float]:
    """How far a run's losses are from another's, step by step, relative to those: the first, on average, at most."""
    apart = [abs(loss - other) / other for loss, other in zip(losses, others, strict=True)]
    return {"loss_first_step": apart[0], "loss_mean": sum(apart) / len(apart), "loss_most": max(apart)}


def held_gib(session: dict[str, Any]) -> float:
    """GiB that a session's steps took, what the graphs hold included."""
    return round(session["peak_steps_gib"] + session["graphs_gib"], 3)
