"""Percentiles. For the median use `statistics.median` of the standard library."""

from __future__ import annotations

from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between the two nearest values.

    This is the default of `numpy.percentile` (method "linear"), so `percentile(values, 50)` is the median.

    Args:
        values: at least one number, in any order.
        percent: 0 to 100.
    """
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])
