"""Intervals for a mean over rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(values: Sequence[float], *, samples: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, chapter 13).

    Args:
        values: one value a row.
        samples: resamples drawn.
        seed: of the resampling; the same rows give the same interval.
    """
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.array([array[generator.integers(0, len(array), len(array))].mean() for _ in range(samples)])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
