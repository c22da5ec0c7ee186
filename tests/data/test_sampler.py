"""Rows of a step depend on seed, epoch and rows per step alone."""

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from hw3.data.sampler import StepSampler

LENGTHS = [5, 9, 3, 7, 8, 2, 6, 4, 1, 10, 12]


def test_literal_order() -> None:
    sampler = StepSampler(LENGTHS, 4, seed=0)
    assert (sampler.steps_per_epoch, len(sampler)) == (2, 8)
    assert sampler.steps(0) == [[0, 2, 5, 8], [10, 1, 4, 3]]
    assert sampler.steps(1) == [[10, 4, 3, 6], [0, 7, 2, 8]]
    # Within a block, a step holds rows of neighbouring lengths.
    assert sorted([LENGTHS[row] for row in step] for step in sampler.steps(0)) == [[5, 3, 2, 1], [12, 9, 8, 7]]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=8, max_size=900),
    rows_per_step=st.integers(1, 8),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_an_epoch_takes_each_row_once_at_most(lengths: list[int], rows_per_step: int, seed: int, epoch: int) -> None:
    sampler = StepSampler(lengths, rows_per_step, seed)
    steps = sampler.steps(epoch)
    rows = [row for step in steps for row in step]
    assert len(steps) == len(lengths) // rows_per_step and all(len(step) == rows_per_step for step in steps)
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(len(lengths)))
    assert sampler.rows_of(epoch * len(steps)) == steps[0]
    sampler.set_epoch(epoch)
    assert list(sampler) == rows


def test_every_way_of_cutting_a_step_sees_its_rows() -> None:
    sampler = StepSampler(list(range(1, 41)), 8, seed=3)
    whole = [sorted(batch) for batch in BatchSampler(sampler, 8, drop_last=False)]
    for rows in (1, 2, 4):
        parts = list(BatchSampler(sampler, rows, drop_last=False))
        share = 8 // rows
        joined = [sorted(chain.from_iterable(parts[at : at + share])) for at in range(0, len(parts), share)]
        assert joined == whole


def test_lengths_are_grouped() -> None:
    lengths = [10 + (row * 37) % 100 for row in range(400)]
    sampler = StepSampler(lengths, 8, seed=1)
    padded = sum(8 * max(lengths[row] for row in step) for step in sampler.steps(0))
    assert padded < 1.05 * sum(lengths)


def test_processes_of_a_step_have_like_work() -> None:
    """The process with the longest rows has the most to do, padding included; the others wait for it."""
    lengths = [90 + (row * 37) % 200 for row in range(4000)]
    for rows_per_step, processes in ((8, 2), (16, 4), (32, 4)):
        share = rows_per_step // processes
        longest = everything = 0
        for step in StepSampler(lengths, rows_per_step, seed=1).steps(0):
            work = [share * max(lengths[row] for row in step[at : at + share]) for at in range(0, rows_per_step, share)]
            longest, everything = longest + max(work), everything + sum(work)
        assert longest < 1.03 * everything / processes
