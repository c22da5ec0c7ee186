"""`data.dev_fraction`: which training rows are dev rows."""

import json

from hypothesis import given
from hypothesis import strategies as st

from hw3.data.dev_split import format_dev_rows, split_dev_rows
from hw3.data.rows import Row

ROWS = [Row(f"row-{number}", f"問{number}", f"答{number}", number) for number in range(1, 101)]


def ids(rows: list[Row]) -> set[str]:
    return {row.id for row in rows}


@given(st.floats(0.001, 0.999), st.integers(0, 1000))
def test_split_divides_the_rows_and_keeps_their_order(fraction: float, seed: int) -> None:
    train, dev = split_dev_rows(ROWS, fraction, seed)
    assert len(dev) == max(1, round(100 * fraction))
    assert not ids(train) & ids(dev) and ids(train) | ids(dev) == ids(ROWS)
    assert train == sorted(train, key=lambda row: row.number) and dev == sorted(dev, key=lambda row: row.number)


def test_split_depends_on_the_seed_and_on_the_text_but_not_on_the_position() -> None:
    _, dev = split_dev_rows(ROWS, 0.1, 42)
    assert ids(split_dev_rows(ROWS[::-1], 0.1, 42)[1]) == ids(dev)
    assert ids(split_dev_rows(ROWS, 0.1, 43)[1]) != ids(dev)
    # Of one row more, at most one other row moves.
    more = [*ROWS, Row("row-101", "問101", "答101")]
    assert len(ids(split_dev_rows(more, 0.1, 42)[1]) & ids(dev)) >= 9


def test_split_keeps_rows_with_the_same_text_together() -> None:
    copies = [Row(f"copy-{number}", f"問{number}", f"答{number}") for number in range(1, 101)]
    for fraction in (0.05, 0.1, 0.5):
        train, dev = split_dev_rows([*ROWS, *copies], fraction, 42)
        assert not {row.instruction for row in train} & {row.instruction for row in dev}


def test_split_of_one_row_leaves_none_for_training() -> None:
    assert split_dev_rows(ROWS[:1], 0.1, 42) == ([], ROWS[:1])


def test_file_of_dev_rows_has_the_keys_of_a_data_file() -> None:
    assert json.loads(format_dev_rows(ROWS[:1])) == [{"id": "row-1", "instruction": "問1", "output": "答1"}]
