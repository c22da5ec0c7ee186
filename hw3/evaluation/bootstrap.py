"""Bootstrap intervals of the mean perplexity, and of the difference between two entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hw3.evaluation.perplexity import RowScore

_MAX_INDICES_PER_CHUNK = 1_000_000  # 16 MB: an index and a value per drawn row


def bootstrap_interval(values: Sequence[float], *, samples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, chapter 13).

    Args:
        values: one value per row.
        samples: number of resamples.
        seed: seed of the resampling; the same rows give the same interval.
    """
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    chunk_size = max(1, _MAX_INDICES_PER_CHUNK // len(array))
    chunk_sizes = [min(chunk_size, samples - done) for done in range(0, samples, chunk_size)]
    means = [array[generator.integers(0, len(array), (size, len(array)))].mean(axis=1) for size in chunk_sizes]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """The difference between two entries on the same rows.

    Attributes:
        difference: mean over rows of the second entry's perplexity minus the first's. Below 0 the second is better.
        ci95: bootstrap interval of that mean, with both entries of a row resampled together.
        better: number of rows with a lower perplexity in the second entry.
        worse: number of rows with a higher perplexity in the second entry.
    """

    difference: float
    ci95: tuple[float, float]
    better: int
    worse: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


def paired_difference(
    first: Sequence[RowScore], second: Sequence[RowScore], *, samples: int, seed: int
) -> PairedDifference:
    """Compare two entries row by row.

    Args:
        first: scores of the first entry.
        second: scores of the second entry, on the same rows in the same order.
        samples: number of bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: the entries do not have the same rows in the same order.
    """
    if [score.id for score in first] != [score.id for score in second]:
        raise ValueError("the entries were scored on different rows")
    differences = [b.perplexity - a.perplexity for a, b in zip(first, second, strict=True)]
    return PairedDifference(
        math.fsum(differences) / len(differences),
        bootstrap_interval(differences, samples=samples, seed=seed),
        sum(difference < 0 for difference in differences),
        sum(difference > 0 for difference in differences),
    )
