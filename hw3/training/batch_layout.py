"""Divide the rows of an optimizer step among processes and micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """How the rows of one optimizer step are divided.

    Attributes:
        processes: number of processes.
        rows_per_device: rows of one micro-batch in one process (`per_device_train_batch_size`).
        accumulation: micro-batches per step in one process (`gradient_accumulation_steps`).
    """

    processes: int
    rows_per_device: int
    accumulation: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes."""
        return self.processes * self.rows_per_device * self.accumulation

    def merge_micro_batches(self) -> BatchLayout:
        """Return the layout in which each process computes its rows of a step in one micro-batch."""
        return BatchLayout(self.processes, self.rows_per_device * self.accumulation, 1)


def divide_batch(recipe: Recipe, processes: int) -> BatchLayout:
    """Divide a recipe's rows per step among processes: they take over accumulation steps first, then rows.

    Args:
        recipe: the recipe.
        processes: number of processes.

    Raises:
        UserError: there is no process, or the rows cannot be divided; names the nearest numbers that work.
    """
    if processes < 1:
        raise UserError(f"found {processes} processes; expected 1 or more")
    rows = recipe.training.get("per_device_train_batch_size", 8)
    accumulation = recipe.training.get("gradient_accumulation_steps", 1)
    total = rows * accumulation
    if total % processes:
        divisors = [number for number in range(1, total + 1) if total % number == 0]
        below = max(number for number in divisors if number < processes)
        above = min((number for number in divisors if number > processes), default=None)
        nearest = f"{below}" if above is None else f"{below} or {above}"
        divisible_rows = sorted({max(total // processes, 1) * processes, -(-total // processes) * processes})
        raise UserError(
            f"training: {total} rows per step (per_device_train_batch_size {rows} x gradient_accumulation_steps "
            f"{accumulation}) cannot be divided among {processes} processes; use {nearest} processes, "
            f"or {' or '.join(map(str, divisible_rows))} rows per step"
        )
    shared = math.gcd(accumulation, processes)
    return BatchLayout(processes, rows // (processes // shared), accumulation // shared)
