"""The order of rows: shuffled, grouped by length, a function of seed, epoch and rows per step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

STEPS_PER_BLOCK = 50  # steps whose rows are sorted together: long enough to save padding, short enough to stay random


class StepSampler(Sampler[int]):
    """Yields row indices so that each run of `rows_per_step` of them is one optimizer step.

    Every way of cutting a step into processes and micro-batches takes consecutive indices, so each sees the same rows
    in the same step. Dealing rows out to processes by length would win nothing: a step's rows are of like length, and a
    batch is as wide as its longest row. Rows that do not fill a last step are left out of the epoch, other ones every
    time.

    Args:
        lengths: tokens of each row.
        rows_per_step: rows of one optimizer step, over all processes and micro-batches.
        seed: the run's seed.

    Raises:
        ValueError: there are fewer rows than one step takes.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        if len(lengths) < rows_per_step:
            raise ValueError(f"{len(lengths)} rows do not fill one step of {rows_per_step}")
        self.lengths = list(lengths)
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = 0
        self._drawn: tuple[int, list[list[int]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one pass over the rows."""
        return len(self.lengths) // self.rows_per_step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        for step in self.steps(self.epoch):
            yield from step

    def steps(self, epoch: int) -> list[list[int]]:
        """The epoch's steps in order, each a list of `rows_per_step` row indices."""
        if self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        return self._drawn[1]

    def _draw(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()[: len(self)]
        steps: list[list[int]] = []
        block = STEPS_PER_BLOCK * self.rows_per_step
        for start in range(0, len(order), block):
            # Stable, so that rows of one length keep their random order.
            rows = sorted(order[start : start + block], key=lambda row: -self.lengths[row])
            steps += [rows[at : at + self.rows_per_step] for at in range(0, len(rows), self.rows_per_step)]
        return [steps[index] for index in torch.randperm(len(steps), generator=generator).tolist()]

    def rows_of(self, global_step: int) -> list[int]:
        """Row indices of an optimizer step of the run, counted from 0."""
        epoch, step = divmod(global_step, self.steps_per_epoch)
        return self.steps(epoch)[step]
