"""Scores by direction, by output length and by row, with values computed by hand."""

import math

import pytest

from hw3.evaluation.breakdown import scores_by_direction, scores_by_length, top_contributors
from hw3.evaluation.perplexity import RowScore

# Perplexities 8, 2 and 6; the first has one token, the second three.
SCORES = [
    RowScore("a", math.log(8), 1, 10),
    RowScore("b", 3 * math.log(2), 3, 11),
    RowScore("c", math.log(6), 1, 51),
]


def test_scores_by_direction_groups_rows_by_their_instruction() -> None:
    instructions = {"a": "今天下雨。\n翻譯成文言文：", "b": "昨天下雨。\n翻譯成文言文：", "c": "說說你自己"}
    groups = scores_by_direction(SCORES, instructions)
    assert list(groups) == ["m2c", "other"]
    assert groups["m2c"].mean_perplexity == pytest.approx(5)
    assert groups["m2c"].token_perplexity == pytest.approx(2 ** (6 / 4))
    assert (groups["m2c"].rows, groups["m2c"].tokens) == (2, 4)
    assert groups["other"].mean_perplexity == pytest.approx(6)


def test_scores_by_length_groups_rows_by_output_characters() -> None:
    groups = scores_by_length(SCORES)
    assert {name: group.mean_perplexity for name, group in groups.items()} == {
        "1-10": pytest.approx(8),
        "11-25": pytest.approx(2),
        "51-": pytest.approx(6),
    }


def test_top_contributors_are_sorted_with_their_share_of_the_sum() -> None:
    assert [(row.id, row.perplexity, row.share, row.tokens) for row in top_contributors(SCORES)] == [
        ("a", pytest.approx(8), pytest.approx(8 / 16), 1),
        ("c", pytest.approx(6), pytest.approx(6 / 16), 1),
        ("b", pytest.approx(2), pytest.approx(2 / 16), 3),
    ]


def test_top_contributors_are_at_most_ten() -> None:
    scores = [RowScore(f"{number:02}", 1.0, 1, 1) for number in range(12)]
    assert [row.id for row in top_contributors(scores)] == [f"{number:02}" for number in range(10)]
