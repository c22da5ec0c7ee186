"""Read the losses and times that a training run logged, from its last checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hw3.runs.run import Run


def read_loss_logs(run: Path) -> list[dict[str, Any]]:
    """Return the log entries that have a loss, in order.

    Each has `step` and `train_runtime`, the seconds since training began.
    """
    log_history = Run(run).complete_checkpoints()[-1].trainer_state()["log_history"]
    return [entry for entry in log_history if "loss" in entry]


def seconds_per_step(logs: list[dict[str, Any]]) -> list[float]:
    """Return the seconds per optimizer step between each two neighboring log entries."""
    return [
        (later["train_runtime"] - earlier["train_runtime"]) / (later["step"] - earlier["step"])
        for earlier, later in itertools.pairwise(logs)
    ]


def compare_losses(losses: list[float], reference: list[float]) -> dict[str, float]:
    """Return the relative differences of two runs' losses: of the first step, the mean over steps, the largest."""
    differences = [abs(loss - expected) / expected for loss, expected in zip(losses, reference, strict=True)]
    return {
        "loss_first_step": differences[0],
        "loss_mean": sum(differences) / len(differences),
        "loss_largest": max(differences),
    }


def held_gib(memory: dict[str, Any]) -> float:
    """Return the peak of the steps' memory, that of the CUDA graphs included, from the fields of a session."""
    return round(memory["peak_steps_gib"] + memory["graphs_gib"], 3)
