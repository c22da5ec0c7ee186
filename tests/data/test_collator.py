"""Literal batches, and every row that must be refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw3.data.collator import CompletionOnlyCollator

# Padding is EOS, as with Llama-3: a mask by id would lose the EOS label.
COLLATOR = CompletionOnlyCollator(pad_id=1, eos_id=1)


def test_batch() -> None:
    batch = COLLATOR(
        [
            {"input_ids": [2, 7, 8, 9, 1], "labels": [-100, -100, 8, 9, 1]},
            {"input_ids": [2, 5, 1], "labels": [-100, 5, 1]},
        ]
    )
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 1], [2, 5, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9, 1], [-100, 5, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_buckets() -> None:
    collator = CompletionOnlyCollator(pad_id=0, eos_id=1, buckets=(4, 8))
    row = {"input_ids": [2, 7, 8, 9, 1], "labels": [-100, -100, 8, 9, 1]}
    assert collator([row])["input_ids"].tolist() == [[2, 7, 8, 9, 1, 0, 0, 0]]
    assert collator([row])["labels"].tolist() == [[-100, -100, 8, 9, 1, -100, -100, -100]]
    long = {"input_ids": [2] * 8 + [1], "labels": [-100] * 8 + [1]}
    with pytest.raises(ValueError, match="a row of 9 tokens is longer than the last bucket, 8"):
        collator([long])


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([2, 5, 1], [-100, -100, -100], "without a label"),
        ([2, 5, 1], [-100, 5], "3 input ids but 2 labels"),
        ([2, 5, 6], [-100, 5, 6], "the last label is 6, not EOS 1"),
        ([2, 5, 1], [-100, 4, 1], "labels must be the input ids"),
        ([2, 5, 6, 1], [-100, 5, -100, 1], "labels must be the input ids"),
        ([2, 5, 1, 0], [-100, 5, 1, 0], "the last label is 0, not EOS 1"),
    ],
)
def test_refused(ids: list[int], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COLLATOR([{"input_ids": ids, "labels": labels}])


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.lists(st.integers(0, 9), max_size=9)),
    min_size=1,
    max_size=5,
)


@given(ROWS)
def test_labels_are_outputs_and_nothing_else(rows: list[tuple[list[int], list[int]]]) -> None:
    outputs = [[*output, 1] for _, output in rows]
    batch = COLLATOR(
        [
            {"input_ids": prompt + output, "labels": [-100] * len(prompt) + output}
            for (prompt, _), output in zip(rows, outputs, strict=True)
        ]
    )
    for index, ((prompt, _), output) in enumerate(zip(rows, outputs, strict=True)):
        length = len(prompt) + len(output)
        assert [label for label in batch["labels"][index].tolist() if label != -100] == output
        assert batch["input_ids"][index, :length].tolist() == prompt + output
        assert batch["attention_mask"][index].sum() == length
