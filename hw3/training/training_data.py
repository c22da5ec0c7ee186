"""Encode the training rows."""

from __future__ import annotations

import statistics

from transformers import PreTrainedTokenizerBase

from hw3.common.errors import UserError, truncate_problems
from hw3.config.data_files import source_file
from hw3.config.recipe import Recipe
from hw3.data.chat_rendering import FIXED_DATE_NOTE, get_chat_template_date
from hw3.data.input_limits import InputLimits
from hw3.data.rows import DataFileKey, Row
from hw3.data.tokenization import EncodedRow, Encoder, LengthReport, apply_max_length, count_unknown


def encode_training_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> tuple[list[EncodedRow], list[str]]:
    """Encode the training rows and apply `data.max_length`; return them with lines for the user that report it.

    Raises:
        UserError: rows are too long, or there are too few of them for one step.
    """
    encoder = Encoder(tokenizer, recipe.prompt)
    encoded, lengths = apply_max_length(
        [encoder.encode(row) for row in rows],
        recipe.data.max_length,
        recipe.data.too_long,
        source=recipe.data.train,
        has_bos=encoder.bos_token_id is not None,
        numbers={row.id: row.number for row in rows},
    )
    if len(encoded) < recipe.rows_per_step:
        raise UserError(
            f"{recipe.data.train}: {len(encoded)} rows do not fill one step of {recipe.rows_per_step} rows; lower "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    notes = _describe_rows(recipe, tokenizer, encoded, lengths)
    if recipe.prompt.chat_template and get_chat_template_date(tokenizer) is not None:
        notes.append(FIXED_DATE_NOTE)
    return encoded, notes


def check_input_limits(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    limits: InputLimits,
    rows_by_file: dict[DataFileKey, list[Row]],
    training_rows: list[EncodedRow],
) -> None:
    """Check that the model takes all rows, and the special tokens that training adds.

    Args:
        recipe: the recipe.
        tokenizer: the base model's tokenizer.
        limits: what the base model takes as input.
        rows_by_file: the rows of the data files.
        training_rows: the training rows as they are trained on.

    Raises:
        UserError: rows have too many tokens, or there are tokens without an embedding.
    """
    problems = limits.find_special_token_problems(tokenizer)
    if not problems:  # else EOS would be reported for every row
        encoder = Encoder(tokenizer, recipe.prompt)
        for key, rows in rows_by_file.items():
            encoded = training_rows if key == "train" else [encoder.encode(row) for row in rows]
            numbers = {row.id: row.number for row in rows}
            problems += limits.find_row_problems(tokenizer, encoded, source_file(recipe.data, key), numbers=numbers)
    if problems:
        raise UserError(*truncate_problems(problems))


def _describe_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[EncodedRow], lengths: LengthReport
) -> list[str]:
    """Return lines on the lengths of training rows, and on what may surprise the user about them."""
    tokens = [len(row) for row in rows]
    notes = [
        f"{len(rows)} rows of {recipe.data.train}: {statistics.median(tokens):g} tokens (median), {max(tokens)} at most"
    ]
    if recipe.prompt.turn.endswith(" "):
        notes.append("the prompt ends with a space; most vocabularies put a word's space before the word")
    if lengths.dropped:
        notes.append(f"{len(lengths.dropped)} rows longer than data.max_length={recipe.data.max_length} dropped")
    if lengths.truncated:
        notes.append(
            f"{len(lengths.truncated)} prompts truncated at their beginning to data.max_length={recipe.data.max_length}"
        )
    if unknown := count_unknown(rows, tokenizer.unk_token_id):
        notes.append(f"{unknown} output tokens are unknown to the tokenizer")
    return notes
