"""Break the scores of one entry down by direction, by output length, and by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hw3.data.templates import detect_direction
from hw3.evaluation.perplexity import RowScore, summarize
from hw3.runs.results_file import GroupScore, RowContribution

NUM_TOP_CONTRIBUTORS = 10
# Output characters at which the groups of rows by length begin.
LENGTH_GROUP_STARTS = (1, 11, 26, 51)


def scores_by_direction(scores: Sequence[RowScore], instructions: Mapping[str, str]) -> dict[str, GroupScore]:
    """Return scores by translation direction.

    Args:
        scores: scores of an entry's rows.
        instructions: instruction by row id.

    Returns:
        Scores by `m2c` (into Classical Chinese), `c2m` (into modern Chinese) and `other` (no known template); groups
        without rows are absent.
    """
    groups: dict[str, list[RowScore]] = {}
    for score in scores:
        groups.setdefault(detect_direction(instructions[score.id]) or "other", []).append(score)
    return {name: _score_group(groups[name]) for name in ("m2c", "c2m", "other") if name in groups}


def scores_by_length(scores: Sequence[RowScore]) -> dict[str, GroupScore]:
    """Return scores by number of output characters, as `1-10` … `51-`; groups without rows are absent."""
    groups: dict[str, list[RowScore]] = {}
    for start, end in zip(LENGTH_GROUP_STARTS, (*LENGTH_GROUP_STARTS[1:], None), strict=True):
        name = f"{start}-{end - 1}" if end else f"{start}-"
        members = [score for score in scores if score.characters >= start and (end is None or score.characters < end)]
        if members:
            groups[name] = members
    return {name: _score_group(members) for name, members in groups.items()}


def top_contributors(scores: Sequence[RowScore]) -> list[RowContribution]:
    """Return the rows with the highest perplexities, each with its share of the sum over all rows."""
    total = math.fsum(score.perplexity for score in scores)
    highest = sorted(scores, key=lambda score: (-score.perplexity, score.id))[:NUM_TOP_CONTRIBUTORS]
    return [
        RowContribution(id=score.id, perplexity=score.perplexity, share=score.perplexity / total, tokens=score.tokens)
        for score in highest
    ]


def _score_group(scores: Sequence[RowScore]) -> GroupScore:
    summary = summarize(scores)
    return GroupScore(
        mean_perplexity=summary.mean_perplexity,
        token_perplexity=summary.token_perplexity,
        rows=summary.rows,
        tokens=summary.tokens,
    )
