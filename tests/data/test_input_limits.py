"""Rows and special tokens that a model has no embedding or no position for."""

import pytest
from helpers import character_tokenizer
from tiny_models import OTHER_ARCHITECTURES
from transformers import LlamaConfig

from hw3.data.input_limits import InputLimits
from hw3.data.tokenization import EncodedRow

ADVICE = (
    "but the model has embeddings for ids 0 to 9 only; call model.resize_token_embeddings({}) and save the model, "
    "or use its own tokenizer"
)


@pytest.mark.parametrize(
    ("name", "limits"),
    [("gpt2", InputLimits(64, 96)), ("opt", InputLimits(64, 256)), ("mpt", InputLimits(64, 256))],
)
def test_from_config_knows_the_names_of_other_architectures(name: str, limits: InputLimits) -> None:
    assert InputLimits.from_config(OTHER_ARCHITECTURES[name][0]) == limits


def test_from_config_sets_no_limit_without_position_embeddings() -> None:
    limits = InputLimits.from_config(OTHER_ARCHITECTURES["bloom"][0])
    row = EncodedRow("a", [2] * 100_000, [1], 0)
    assert limits.find_row_problems(character_tokenizer(), [row], "rows.json") == []


def test_find_special_token_problems_names_each_token_without_an_embedding() -> None:
    tokenizer = character_tokenizer()
    assert InputLimits.from_config(LlamaConfig(vocab_size=3)).find_special_token_problems(tokenizer) == []
    tokenizer.pad_token = "甲"  # id 4
    problems = InputLimits(4, 256).find_special_token_problems(tokenizer)
    assert len(problems) == 1
    assert "the padding token 甲 has the id 4, but the model has embeddings for ids 0 to 3 only" in problems[0]
    assert "resize_token_embeddings(5)" in problems[0]


def test_find_row_problems_names_row_and_token() -> None:
    rows = [
        EncodedRow("fits", [2, 9], [9, 1], 1),
        EncodedRow("id", [2, 4, 10], [5, 1], 1),
        EncodedRow("output id", [2, 4], [11, 1], 1),
        EncodedRow("long", [2, 4, 5, 6], [7, 8, 1], 2),
    ]
    limits = InputLimits(10, 6)
    expected = [
        f"rows.json: row 2 (id id): the token 庚 has the id 10, {ADVICE.format(11)}",
        f"rows.json: row 3 (id output id): the token 辛 has the id 11, {ADVICE.format(12)}",
        "rows.json: row 4 (id long): 7 tokens with 2 few-shot examples, the model takes 6",
    ]
    assert limits.find_row_problems(character_tokenizer(), rows, "rows.json", shots=2) == expected
    numbers = {"long": 7}
    (problem,) = limits.find_row_problems(character_tokenizer(), rows[3:], "rows.json", numbers=numbers)
    assert problem.startswith("rows.json: row 7 (id long): 7 tokens")
