"""Literal batches, and every kind of row that the collator refuses."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw3.data.collator as collator_module
from hw3.data.collator import CompletionOnlyCollator

# The padding id is the EOS id, as with Llama-3: masking by id would lose the EOS label.
COLLATOR = CompletionOnlyCollator(pad_token_id=1, eos_token_id=1)


def test_collator_pads_on_the_right_and_masks_by_length() -> None:
    batch = COLLATOR(
        [
            {"input_ids": [2, 7, 8, 9, 1], "labels": [-100, -100, 8, 9, 1]},
            {"input_ids": [2, 5, 1], "labels": [-100, 5, 1]},
        ]
    )
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 1], [2, 5, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9, 1], [-100, 5, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_collator_returns_the_batch_of_its_docstring() -> None:
    collator = CompletionOnlyCollator(pad_token_id=0, eos_token_id=1)
    rows = [
        {"input_ids": [2, 7, 8, 9, 1], "labels": [-100, -100, 8, 9, 1]},
        {"input_ids": [2, 5, 1], "labels": [-100, 5, 1]},
    ]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 1], [2, 5, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9, 1], [-100, 5, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert doctest.testmod(collator_module).failed == 0


def test_collator_returns_the_positions_that_predict_outputs() -> None:
    rows = [{"input_ids": [2, 7, 8, 1], "labels": [-100, -100, 8, 1]}, {"input_ids": [2, 5, 1], "labels": [-100, 5, 1]}]
    batch = CompletionOnlyCollator(pad_token_id=0, eos_token_id=1, return_output_positions=True)(rows)
    assert batch["output_positions"].tolist() == [1, 2, 4, 5]
    assert batch["output_ids"].tolist() == [8, 1, 5, 1]
    assert batch["outputs_per_row"] == [2, 2]


def test_collator_pads_to_the_smallest_bucket_that_fits() -> None:
    collator = CompletionOnlyCollator(pad_token_id=0, eos_token_id=1, bucket_lengths=(4, 8))
    row = {"input_ids": [2, 7, 8, 9, 1], "labels": [-100, -100, 8, 9, 1]}
    assert collator([row])["input_ids"].tolist() == [[2, 7, 8, 9, 1, 0, 0, 0]]
    assert collator([row])["labels"].tolist() == [[-100, -100, 8, 9, 1, -100, -100, -100]]
    long = {"input_ids": [2] * 8 + [1], "labels": [-100] * 8 + [1]}
    with pytest.raises(ValueError, match="a row of 9 tokens is longer than the last bucket, which has 8 tokens"):
        collator([long])


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([2, 5, 1], [-100, -100, -100], "a row has no label"),
        ([2, 5, 1], [-100, 5], "3 input ids but 2 labels"),
        ([2, 5, 6], [-100, 5, 6], r"the last label is 6; expected EOS \(1\)"),
        ([2, 5, 1], [-100, 4, 1], "labels differ from its input ids"),
        ([2, 5, 6, 1], [-100, 5, -100, 1], "labels differ from its input ids"),
        ([2, 5, 1, 0], [-100, 5, 1, 0], r"the last label is 0; expected EOS \(1\)"),
    ],
)
def test_collator_refuses_invalid_rows(ids: list[int], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COLLATOR([{"input_ids": ids, "labels": labels}])


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.lists(st.integers(0, 9), max_size=9)),
    min_size=1,
    max_size=5,
)


@given(ROWS)
def test_labels_are_the_outputs_only(rows: list[tuple[list[int], list[int]]]) -> None:
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
