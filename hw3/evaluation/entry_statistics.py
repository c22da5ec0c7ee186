"""Compute every figure of an entry from the scores of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hw3.evaluation.bootstrap import bootstrap_interval
from hw3.evaluation.breakdown import scores_by_direction, scores_by_length, top_contributors
from hw3.evaluation.perplexity import RowScore, summarize


def compute_entry_statistics(
    scores: Sequence[RowScore], instructions: Mapping[str, str], *, bootstrap_samples: int, bootstrap_seed: int
) -> dict[str, Any]:
    """Return the fields of `ScoreEntry` that follow from the scores of the rows.

    Args:
        scores: scores of all rows, in the order of the data file.
        instructions: instruction by row id.
        bootstrap_samples: number of samples for the interval.
        bootstrap_seed: seed of the samples.
    """
    perplexities = [score.perplexity for score in scores]
    return {
        "mean_perplexity_ci95": bootstrap_interval(perplexities, samples=bootstrap_samples, seed=bootstrap_seed),
        **asdict(summarize(scores)),
        "by_direction": scores_by_direction(scores, instructions),
        "by_length": scores_by_length(scores),
        "top_contributors": top_contributors(scores),
    }
