"""What the row scores of one entry, or of two, can say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hw3.data.templates import direction_of
from hw3.evaluation.perplexity import RowScore, summarize

HEAVIEST = 10
# Output characters at which groups of rows by length begin.
LENGTH_GROUPS = (1, 11, 26, 51)
_DRAWN_AT_ONCE = 1_000_000  # rows of a bootstrap: 16 MB


def bootstrap_interval(values: Sequence[float], *, samples: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, chapter 13).

    Args:
        values: one value a row.
        samples: resamples drawn.
        seed: of the resampling; the same rows give the same interval.
    """
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // len(array))
    sizes = [min(at_once, samples - done) for done in range(0, samples, at_once)]
    means = [array[generator.integers(0, len(array), (size, len(array)))].mean(axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Two entries on the same rows.

    Attributes:
        difference: mean over rows of the second's perplexity minus the first's; below 0 the second is better.
        ci95: bootstrap interval of that mean, rows resampled together; an interval without 0 is a difference.
        better: rows on which the second has the lower perplexity.
        worse: rows on which it has the higher one.
    """

    difference: float
    ci95: tuple[float, float]
    better: int
    worse: int


def paired_difference(
    first: Sequence[RowScore], second: Sequence[RowScore], *, samples: int, seed: int
) -> PairedDifference:
    """Compare two entries row by row.

    Raises:
        ValueError: the two have not the same rows in the same order.
    """
    if [score.id for score in first] != [score.id for score in second]:
        raise ValueError("the two entries were scored on other rows")
    differences = [b.perplexity - a.perplexity for a, b in zip(first, second, strict=True)]
    return PairedDifference(
        math.fsum(differences) / len(differences),
        bootstrap_interval(differences, samples=samples, seed=seed),
        sum(difference < 0 for difference in differences),
        sum(difference > 0 for difference in differences),
    )


def by_direction(scores: Sequence[RowScore], instructions: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Figures of the rows into Classical Chinese (`m2c`), out of it (`c2m`), and of those no template tells (`other`).

    Args:
        scores: an entry's rows.
        instructions: instruction by row id.
    """
    groups: dict[str, list[RowScore]] = {}
    for score in scores:
        groups.setdefault(direction_of(instructions[score.id]) or "other", []).append(score)
    return {name: _figures(groups[name]) for name in ("m2c", "c2m", "other") if name in groups}


def by_length(scores: Sequence[RowScore]) -> dict[str, dict[str, Any]]:
    """Figures by characters of the output."""
    groups: dict[str, list[RowScore]] = {}
    for start, end in zip(LENGTH_GROUPS, (*LENGTH_GROUPS[1:], None), strict=True):
        name = f"{start}-{end - 1}" if end else f"{start}-"
        members = [score for score in scores if score.characters >= start and (end is None or score.characters < end)]
        if members:
            groups[name] = members
    return {name: _figures(members) for name, members in groups.items()}


def heaviest(scores: Sequence[RowScore]) -> list[dict[str, Any]]:
    """The rows that weigh most in the mean, each with its share of the sum."""
    total = math.fsum(score.perplexity for score in scores)
    ordered = sorted(scores, key=lambda score: (-score.perplexity, score.id))[:HEAVIEST]
    return [
        {"id": s.id, "perplexity": s.perplexity, "share": s.perplexity / total, "tokens": s.tokens} for s in ordered
    ]


def _figures(scores: Sequence[RowScore]) -> dict[str, Any]:
    figures = asdict(summarize(scores))
    return {key: figures[key] for key in ("mean_perplexity", "token_perplexity", "rows", "tokens")}
