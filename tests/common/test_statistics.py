"""`percentile` against literal values and against numpy."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.statistics import percentile


def test_percentile_interpolates_between_the_two_nearest_values() -> None:
    assert percentile(range(10), 50) == 4.5
    assert percentile([4, 1, 3, 2], 95) == pytest.approx(3.85)
    assert percentile([7], 95) == 7


@given(st.lists(st.integers(0, 10_000), min_size=1), st.integers(0, 100))
def test_percentile_matches_numpy(values: list[int], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile(values, 50) == statistics.median(values)
