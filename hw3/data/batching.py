"""Group encoded rows into batches by length, and find the prefix that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hw3.data.tokenization import EncodedRow


def common_prefix(rows: Sequence[EncodedRow]) -> int:
    """How many ids all prompts begin with; each keeps one of its own, the one that predicts the first output token."""
    shortest = min((row.prompt_ids for row in rows), key=len)
    length = len(shortest) - 1
    for row in rows:
        while row.prompt_ids[:length] != shortest[:length]:
            length -= 1
    return length


def batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Row indices by falling length, as many a batch as fit the budget once padded; one row at least."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(1, tokens_per_batch // lengths[order[0]])
        yield order[:size]
        order = order[size:]
