"""The rows of a step depend only on seed, epoch and rows per step."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from hw3.data.sampler import StepSampler

LENGTHS = [5, 9, 3, 7, 8, 2, 6, 4, 1, 10, 12]


def test_sampler_order_is_fixed() -> None:
    sampler = StepSampler(LENGTHS, 4, seed=0)
    assert (sampler.steps_per_epoch, len(sampler)) == (2, 8)
    assert sampler.steps_in_epoch(0) == [[0, 2, 5, 8], [10, 1, 4, 3]]
    assert sampler.steps_in_epoch(1) == [[10, 4, 3, 6], [0, 7, 2, 8]]
    # Within a block, the rows of a step have similar lengths.
    assert sorted([LENGTHS[row] for row in step] for step in sampler.steps_in_epoch(0)) == [[5, 3, 2, 1], [12, 9, 8, 7]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=8, max_size=900),
    rows_per_step=st.integers(1, 8),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_an_epoch_uses_each_row_at_most_once(lengths: list[int], rows_per_step: int, seed: int, epoch: int) -> None:
    sampler = StepSampler(lengths, rows_per_step, seed)
    steps = sampler.steps_in_epoch(epoch)
    rows = [row for step in steps for row in step]
    assert len(steps) == len(lengths) // rows_per_step and all(len(step) == rows_per_step for step in steps)
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(len(lengths)))
    assert sampler.rows_at_step(epoch * len(steps)) == steps[0]
    sampler.set_epoch(epoch)
    assert list(sampler) == rows


def test_every_division_into_micro_batches_sees_the_same_rows() -> None:
    sampler = StepSampler(list(range(1, 41)), 8, seed=3)
    complete = [sorted(batch) for batch in BatchSampler(sampler, 8, drop_last=False)]
    for rows in (1, 2, 4):
        parts = list(BatchSampler(sampler, rows, drop_last=False))
        parts_per_step = 8 // rows
        merged = [
            sorted(chain.from_iterable(parts[first : first + parts_per_step]))
            for first in range(0, len(parts), parts_per_step)
        ]
        assert merged == complete


def test_grouping_by_length_saves_padding() -> None:
    lengths = [10 + (row * 37) % 100 for row in range(400)]
    sampler = StepSampler(lengths, 8, seed=1)
    padded = sum(8 * max(lengths[row] for row in step) for step in sampler.steps_in_epoch(0))
    assert padded < 1.05 * sum(lengths)


def test_processes_have_similar_work_in_each_step() -> None:
    """The process with the longest rows has the most tokens to compute, padding included; the others wait for it."""
    lengths = [90 + (row * 37) % 200 for row in range(4000)]
    for rows_per_step, processes in ((8, 2), (16, 4), (32, 4)):
        rows_per_process = rows_per_step // processes
        slowest = total = 0
        for step in StepSampler(lengths, rows_per_step, seed=1).steps_in_epoch(0):
            work = [
                rows_per_process * max(lengths[row] for row in step[first : first + rows_per_process])
                for first in range(0, rows_per_step, rows_per_process)
            ]
            slowest, total = slowest + max(work), total + sum(work)
        assert slowest < 1.03 * total / processes
