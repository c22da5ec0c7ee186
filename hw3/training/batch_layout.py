"""Divide the rows of an optimizer step among processes and micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How one optimizer step's rows are shared out."""

    processes: int
    rows_per_device: int
    accumulation: int


def step_layout(recipe: Recipe, processes: int) -> StepLayout:
    """Share a step's rows among processes: they take over accumulation first, then rows.

    Raises:
        UserError: there is no process, or the rows do not divide; names the nearest numbers of processes that do.
    """
    if processes < 1:
        raise UserError(f"{processes} processes: 1 or more are needed")
    rows = recipe.training.get("per_device_train_batch_size", 8)
    accumulation = recipe.training.get("gradient_accumulation_steps", 1)
    total = rows * accumulation
    if total % processes:
        fitting = [number for number in range(1, total + 1) if total % number == 0]
        below = max(number for number in fitting if number < processes)
        above = min((number for number in fitting if number > processes), default=None)
        nearest = f"{below}" if above is None else f"{below} or {above}"
        rows_that_divide = sorted({max(total // processes, 1) * processes, -(-total // processes) * processes})
        raise UserError(
            f"training: {total} rows a step (per_device_train_batch_size {rows} x gradient_accumulation_steps "
            f"{accumulation}) do not divide among {processes} processes; use {nearest} processes, "
            f"or {' or '.join(map(str, rows_that_divide))} rows a step"
        )
    shared = math.gcd(accumulation, processes)
    return StepLayout(processes, rows // (processes // shared), accumulation // shared)
