"""Read the recipe's data files and encode the training rows."""

from __future__ import annotations

import statistics

from transformers import PreTrainedTokenizerBase

from hw3.common.errors import ProblemCollector, UserError
from hw3.config.data_files import list_data_files
from hw3.config.recipe import Recipe
from hw3.data.rows import DataFileKey, Row, read_rows
from hw3.data.tokenization import EncodedRow, Encoder, LengthReport, apply_max_length, count_unknown


def read_data_files(recipe: Recipe) -> dict[DataFileKey, list[Row]]:
    """Read the recipe's data files; return their rows by key in the `data` section.

    Raises:
        UserError: files are missing or hold invalid rows; names all of them.
    """
    problems = ProblemCollector()
    files = list_data_files(recipe.data).items()
    rows = {key: file_rows for key, path in files if (file_rows := problems.collect(read_rows, path)) is not None}
    problems.raise_problems()
    return rows


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
    )
    if len(encoded) < recipe.rows_per_step:
        raise UserError(
            f"{recipe.data.train}: {len(encoded)} rows do not fill one step of {recipe.rows_per_step} rows; lower "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    return encoded, _describe_rows(recipe, tokenizer, encoded, lengths)


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
