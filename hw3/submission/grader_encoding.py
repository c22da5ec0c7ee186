"""Encode a row exactly as the homework's grader does."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hw3.common.errors import UserError
from hw3.data.rows import Row
from hw3.data.tokenization import EncodedRow

GRADER_MAX_LENGTH = 2048


def encode_as_grader(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: str) -> EncodedRow:
    """One row as the homework's grader encodes it: special tokens spelled in the prompt count, 2,048 ids at most.

    Args:
        tokenizer: the base's.
        row: a row with its output.
        prompt: what the student's `get_prompt` made of its instruction.

    Raises:
        UserError: the prompt alone is too long, so the grader's mean would be no number.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt_ids = bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    output_ids = [*tokenizer(row.output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    room = GRADER_MAX_LENGTH - len(prompt_ids)
    if room < 1:
        raise UserError(
            f"row {row.id}: its prompt takes {len(prompt_ids)} tokens; the grader keeps {GRADER_MAX_LENGTH}"
        )
    return EncodedRow(row.id, prompt_ids, output_ids[:room], len(row.output or ""))
