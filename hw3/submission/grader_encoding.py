"""Encode a row exactly as the homework's grader does."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hw3.common.errors import UserError
from hw3.data.rows import Row
from hw3.data.tokenization import EncodedRow

GRADER_MAX_TOKENS = 2048  # prompt, output and EOS


def encode_as_grader(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: str) -> EncodedRow:
    """Encode a row as the homework's grader does.

    The text of a special or other added token becomes the token itself, and everything after 2,048 tokens is cut off.

    Args:
        tokenizer: tokenizer of the base model.
        row: a row with its output.
        prompt: what the student's `get_prompt` returned for the row's instruction.

    Raises:
        UserError: the prompt leaves no token for the output, so the grader's mean would be NaN.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt_ids = bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    output_ids = [*tokenizer(row.output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    max_output_tokens = GRADER_MAX_TOKENS - len(prompt_ids)
    if max_output_tokens < 1:
        raise UserError(
            f"row {row.id}: its prompt has {len(prompt_ids)} tokens, but the grader reads {GRADER_MAX_TOKENS} with the "
            "output"
        )
    return EncodedRow(row.id, prompt_ids, output_ids[:max_output_tokens], len(row.output or ""))
