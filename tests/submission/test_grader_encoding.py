"""Rows are encoded as the homework's grader encodes them."""

import pytest
from helpers import character_tokenizer

from hw3.common.errors import UserError
from hw3.data.rows import Row
from hw3.submission.grader_encoding import encode_as_grader


def test_encode_as_grader_reads_special_tokens_in_text() -> None:
    encoded = encode_as_grader(character_tokenizer(), Row("1", "甲", "乙"), "甲<eos>")
    assert (encoded.prompt_ids, encoded.output_ids) == ([2, 4, 1], [5, 1])


def test_encode_as_grader_cuts_the_output_at_2048_tokens() -> None:
    encoded = encode_as_grader(character_tokenizer(), Row("1", "甲", "乙" * 10), "甲" * 2044)
    assert len(encoded.prompt_ids) == 2045 and encoded.output_ids == [5, 5, 5]


def test_encode_as_grader_refuses_a_prompt_of_2048_tokens() -> None:
    with pytest.raises(UserError, match="row 1: its prompt has 2048 tokens, but the grader reads 2048 with the output"):
        encode_as_grader(character_tokenizer(), Row("1", "甲", "乙"), "甲" * 2047)
