"""Divide the rows of an optimizer step among processes and micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hw3.config.recipe import Recipe
from hw3.config.validation import check_divisible


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

    def split_micro_batches(self) -> BatchLayout:
        """Return the layout with half the rows per micro-batch; a third, and so on, if they cannot be halved.

        A micro-batch of one row stays as it is.
        """
        parts = next((parts for parts in range(2, self.rows_per_device + 1) if self.rows_per_device % parts == 0), 1)
        return BatchLayout(self.processes, self.rows_per_device // parts, self.accumulation * parts)


def divide_batch(recipe: Recipe, processes: int) -> BatchLayout:
    """Divide a recipe's rows per step among processes: they take over accumulation steps first, then rows.

    Args:
        recipe: the recipe.
        processes: number of processes.

    Raises:
        UserError: there is no process, or the rows cannot be divided; names the nearest numbers that work.
    """
    check_divisible(recipe.training, processes)
    rows = recipe.training.get("per_device_train_batch_size", 8)
    accumulation = recipe.training.get("gradient_accumulation_steps", 1)
    shared = math.gcd(accumulation, processes)
    return BatchLayout(processes, rows // (processes // shared), accumulation // shared)
