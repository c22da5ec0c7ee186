"""The shards of several processes are merged to one entry."""

from hw3.evaluation.perplexity import RowScore
from hw3.evaluation.scorer import RowScores, merge_shards
from hw3.modeling.adapter_io import InvalidAdapterError

FIRST = RowScores({0: RowScore("a", 1.0, 1, 1), 2: RowScore("c", 3.0, 1, 1)}, 0.5)
SECOND = RowScores({1: RowScore("b", 2.0, 1, 1)}, 0.75)


def test_merge_shards_joins_rows_and_takes_the_time_of_the_slowest_process() -> None:
    merged = merge_shards([FIRST, SECOND])
    assert merged == RowScores(FIRST.by_index | SECOND.by_index, 0.75)


def test_merge_shards_returns_the_error_of_an_invalid_adapter() -> None:
    error = InvalidAdapterError("cut")
    assert merge_shards([FIRST, error]) is error
