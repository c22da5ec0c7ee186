"""The order of training rows: shuffled, grouped by length, and fixed by seed, epoch and rows per step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Rows of this many steps are sorted by length together: enough to save padding, few enough to keep the order random.
STEPS_PER_BLOCK = 50


class StepSampler(Sampler[int]):
    """Yield row indices such that every `rows_per_step` consecutive indices are the rows of one optimizer step.

    However a step is divided into processes and micro-batches, each part takes consecutive indices, so every division
    sees the same rows in the same step. Sorting a step's rows by length before they are divided would gain nothing:
    they have similar lengths already, and a batch is as long as its longest row. Rows that do not fill a last step are
    left out of the epoch; each epoch leaves out different ones.

    Args:
        lengths: tokens of each row.
        rows_per_step: rows per optimizer step, over all processes and micro-batches.
        seed: the run's seed.

    Raises:
        ValueError: there are fewer rows than `rows_per_step`.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        if len(lengths) < rows_per_step:
            raise ValueError(f"{len(lengths)} rows do not fill one step of {rows_per_step} rows")
        self.lengths = list(lengths)
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = 0
        self._cached_steps: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete steps in one pass over the rows."""
        return len(self.lengths) // self.rows_per_step

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch that the next iteration yields, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        for step in self.steps_in_epoch(self.epoch):
            yield from step

    def steps_in_epoch(self, epoch: int) -> list[list[int]]:
        """Return the steps of an epoch in order, each a list of `rows_per_step` row indices."""
        if self._cached_steps[0] != epoch:
            self._cached_steps = epoch, self._shuffle(epoch)
        return self._cached_steps[1]

    def rows_at_step(self, global_step: int) -> list[int]:
        """Return the row indices of one optimizer step of the run, counted from 0."""
        epoch, step = divmod(global_step, self.steps_per_epoch)
        return self.steps_in_epoch(epoch)[step]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        """Shuffle the rows, sort each block of steps by length, then shuffle the steps."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()[: len(self)]
        steps: list[list[int]] = []
        block = STEPS_PER_BLOCK * self.rows_per_step
        for start in range(0, len(order), block):
            # The sort is stable, so rows of equal length keep their random order.
            rows = sorted(order[start : start + block], key=lambda row: -self.lengths[row])
            steps += [rows[first : first + self.rows_per_step] for first in range(0, len(rows), self.rows_per_step)]
        return [steps[index] for index in torch.randperm(len(steps), generator=generator).tolist()]
