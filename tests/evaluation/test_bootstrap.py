"""Bootstrap intervals, and the paired comparison of two entries."""

import math

import numpy as np
import pytest

from hw3.evaluation.bootstrap import bootstrap_interval, paired_difference
from hw3.evaluation.perplexity import RowScore


def row_scores(*perplexities: float) -> list[RowScore]:
    """Return scores of rows with one token each."""
    return [RowScore(str(number), math.log(value), 1, 1) for number, value in enumerate(perplexities)]


def test_bootstrap_interval_agrees_with_the_standard_error() -> None:
    values = [float(number) for number in range(100)]
    low, high = bootstrap_interval(values, samples=2000, seed=0)
    # The mean's standard error is 28.9 / 10, so the interval is about 49.5 - 5.7 to 49.5 + 5.7.
    assert low == pytest.approx(43.8, abs=0.4) and high == pytest.approx(55.2, abs=0.4)
    assert bootstrap_interval(values, samples=2000, seed=0) == (low, high)
    assert bootstrap_interval([3.0], samples=10, seed=0) == (3.0, 3.0)


def test_bootstrap_interval_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).lognormal(2, 2, 251)
    generator = np.random.default_rng(9)
    means = [values[generator.integers(0, 251, 251)].mean() for _ in range(100)]
    expected = tuple(np.quantile(means, (0.025, 0.975)))
    for max_indices in (1, 251 * 7, 10**6):
        monkeypatch.setattr("hw3.evaluation.bootstrap._MAX_INDICES_PER_CHUNK", max_indices)
        assert bootstrap_interval(list(values), samples=100, seed=9) == expected


def test_paired_difference_counts_better_and_worse_rows() -> None:
    pair = paired_difference(row_scores(4, 4, 4, 4), row_scores(3, 3, 4, 5), samples=100, seed=0)
    assert pair.difference == pytest.approx(-0.25)
    assert (pair.better, pair.worse) == (2, 1)
    assert pair.ci95[0] < -0.25 < pair.ci95[1]


def test_paired_difference_refuses_different_rows() -> None:
    with pytest.raises(ValueError, match="different rows"):
        paired_difference(row_scores(4, 4), row_scores(4, 4)[::-1], samples=10, seed=0)
