"""Limit the new tokens of an output by the lengths of the training rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from hw3.data.rows import Row
from hw3.data.tokenization import Encoder

LONGEST_FACTOR = 2
LEAST_NEW_TOKENS = 32


class AnswerLengths:
    """How many tokens an answer may take, EOS included, from the lengths of the training rows.

    Twice the longest training answer to an instruction that has no more characters than the row's, and 32 at least.
    Beyond the longest training instruction the limit grows in proportion.
    """

    def __init__(self, training: Sequence[Row], encoder: Encoder) -> None:
        pairs = sorted((len(row.instruction), len(encoder.output_ids(row.output or ""))) for row in training)
        self._characters = [characters for characters, _ in pairs]
        self._longest = list(accumulate((tokens for _, tokens in pairs), max))

    @property
    def steps(self) -> list[tuple[int, int]]:
        """The instructions' characters at which the longest answer gets longer, with its tokens; the last ones last."""
        pairs = list(zip(self._characters, self._longest, strict=True))
        rising = [pair for before, pair in zip([(0, 0), *pairs], pairs, strict=False) if pair[1] > before[1]]
        return rising if rising[-1] == pairs[-1] else [*rising, pairs[-1]]

    def limit(self, instruction: str) -> int:
        """Most new tokens of the answer to an instruction."""
        known = self._characters[-1]
        place = max(bisect_right(self._characters, len(instruction)), 1)
        longest = self._longest[place - 1] * max(len(instruction), known) / known
        return max(LEAST_NEW_TOKENS, round(LONGEST_FACTOR * longest))
