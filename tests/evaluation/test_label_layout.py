"""Labels of close lines are moved apart."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw3.evaluation.label_layout import spread_positions


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([], []),
        ([0, 30, 15], [0, 30, 15]),
        ([5, 5], [0, 10]),
        # Three positions within a gap are spread around their mean; the distant one stays.
        ([12, 10, 11, 50], [21, 1, 11, 50]),
    ],
)
def test_spread_positions_moves_only_those_that_are_too_close(positions: list[float], expected: list[float]) -> None:
    assert spread_positions(positions, 10) == pytest.approx(expected)


@given(st.lists(st.floats(-1e4, 1e4), max_size=12), st.floats(0.5, 50))
def test_spread_positions_preserves_order_sum_and_least_gap(positions: list[float], gap: float) -> None:
    spread = spread_positions(positions, gap)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    for before, after in pairwise(order):
        assert spread[after] - spread[before] >= gap - 1e-6
    assert sum(spread) == pytest.approx(sum(positions), abs=1e-4)
