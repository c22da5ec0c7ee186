"""Read the recipe's data files and encode the training rows."""

from __future__ import annotations

import statistics
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import EncodedRow, Encoder, LengthReport, apply_max_length, count_unknown

COURSE_DATA = Path("data/homework")
WAYS_TO_GET_DATA = (
    "put the course's train.json and public_test.json into data/homework/",
    "build a similar set from a public corpus: make data CORPUS=... (README, Data)",
    "use the sample in this repository: make train MODEL={model} TRAIN=data/train.json EVAL=data/eval.json",
)


def read_data_files(recipe: Recipe) -> dict[str, list[Row]]:
    """Read and check the recipe's data files; return their rows by key in the `data` section.

    Raises:
        UserError: files are missing or hold invalid rows; names all of them, and three ways to get data if the course's
            files are missing.
    """
    files = {key: Path(name) for key in ("train", "eval", "dev") if (name := getattr(recipe.data, key)) is not None}
    missing = [path for path in files.values() if not path.exists()]
    if missing and not any(path.parent == COURSE_DATA for path in missing):
        raise UserError(*(f"data.{key}: {path}: no such file" for key, path in files.items() if path in missing))
    if missing:
        model = recipe.name.partition("-")[0]
        ways = [f"  {number}. {way.format(model=model)}" for number, way in enumerate(WAYS_TO_GET_DATA, 1)]
        raise UserError(f"no such file: {', '.join(map(str, missing))}. Three ways to get data:", *ways)
    rows, problems = {}, []
    for key, path in files.items():
        try:
            rows[key] = read_rows(path)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
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
