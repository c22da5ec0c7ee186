"""What a model takes as input: how many tokens, and which ids."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hw3.data.tokenization import EncodedRow


@dataclass(frozen=True, slots=True)
class InputLimits:
    """Limits of a model's input.

    Attributes:
        vocabulary_size: number of token ids that the model has an embedding for.
        max_positions: the most tokens of a row.
    """

    vocabulary_size: int
    max_positions: int

    @classmethod
    def from_config(cls, config: Any) -> InputLimits:
        """Return the limits of a model from its configuration."""
        text = config.get_text_config()
        names = ("max_position_embeddings", "max_seq_len")  # the second is MPT's; Bloom has no limit
        limits = [limit for name in names if (limit := getattr(text, name, None)) is not None]
        return cls(text.vocab_size, *limits[:1] or [sys.maxsize])

    def find_special_token_problems(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return which of the tokenizer's padding, EOS and BOS tokens the model has no embedding for."""
        ids = {"padding": tokenizer.pad_token_id, "EOS": tokenizer.eos_token_id, "BOS": tokenizer.bos_token_id}
        return [
            f"{tokenizer.name_or_path}: the {name} token {self._describe_id(tokenizer, token_id)}"
            for name, token_id in ids.items()
            if token_id is not None and token_id >= self.vocabulary_size
        ]

    def find_row_problems(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[EncodedRow],
        source: str,
        *,
        shots: int = 0,
        numbers: Mapping[str, int] | None = None,
    ) -> list[str]:
        """Return which rows have too many tokens, or a token that the model has no embedding for.

        Args:
            tokenizer: the tokenizer of the rows.
            rows: encoded rows.
            source: name of the rows' file.
            shots: number of few-shot examples in their prompts.
            numbers: the number of each row in the file, by its id; None if these are all rows of the file.
        """
        problems = []
        for index, row in enumerate(rows, 1):
            number = index if numbers is None else numbers[row.id]
            place, largest_id = f"{source}: row {number} (id {row.id})", max(row.input_ids)
            if len(row) > self.max_positions:
                problems.append(
                    f"{place}: {len(row)} tokens with {shots} few-shot examples, the model takes {self.max_positions}"
                )
            if largest_id >= self.vocabulary_size:
                problems.append(f"{place}: the token {self._describe_id(tokenizer, largest_id)}")
        return problems

    def _describe_id(self, tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
        return (
            f"{tokenizer.convert_ids_to_tokens(token_id)} has the id {token_id}, but the model has embeddings for ids "
            f"0 to {self.vocabulary_size - 1} only; call model.resize_token_embeddings({token_id + 1}) and save the "
            "model, or use its own tokenizer"
        )
