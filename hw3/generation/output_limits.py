"""Limit the new tokens of an output by the lengths of the training rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from hw3.data.rows import Row
from hw3.data.tokenization import Encoder

LONGEST_OUTPUT_FACTOR = 2
MIN_OUTPUT_LIMIT_TOKENS = 32


class OutputLengthLimits:
    """Limits of new tokens, EOS included, that follow the training rows.

    The limit is twice the longest training output among instructions that have at most as many characters as the given
    one, and at least 32 tokens. For instructions longer than all training instructions it grows in proportion.

    Args:
        training_rows: rows with outputs.
        encoder: encodes the outputs.
    """

    def __init__(self, training_rows: Sequence[Row], encoder: Encoder) -> None:
        lengths = sorted((len(row.instruction), len(encoder.encode_output(row.output or ""))) for row in training_rows)
        self._characters = [characters for characters, _ in lengths]
        self._longest_tokens = list(accumulate((tokens for _, tokens in lengths), max))

    @property
    def breakpoints(self) -> list[tuple[int, int]]:
        """(instruction characters, longest output in tokens) wherever the latter rises, and at the longest instruction.

        Ascending.
        """
        pairs = list(zip(self._characters, self._longest_tokens, strict=True))
        rising = [pair for before, pair in zip([(0, 0), *pairs], pairs, strict=False) if pair[1] > before[1]]
        return rising if rising[-1] == pairs[-1] else [*rising, pairs[-1]]

    def get_max_new_tokens(self, instruction: str) -> int:
        """Return the limit for the output of an instruction."""
        longest_instruction = self._characters[-1]
        count = max(bisect_right(self._characters, len(instruction)), 1)
        longest = self._longest_tokens[count - 1] * max(len(instruction), longest_instruction) / longest_instruction
        return max(MIN_OUTPUT_LIMIT_TOKENS, round(LONGEST_OUTPUT_FACTOR * longest))
