"""Group encoded rows into batches of similar length, and find the prefix that all prompts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hw3.data.tokenization import EncodedRow


def common_prefix_length(rows: Sequence[EncodedRow]) -> int:
    """Return the number of leading ids that all prompts share.

    At least the last id of each prompt is excluded, because its logits predict the first output token.
    """
    shortest = min((row.prompt_ids for row in rows), key=len)
    length = len(shortest) - 1
    for row in rows:
        while row.prompt_ids[:length] != shortest[:length]:
            length -= 1
    return length


def batch_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield batches of row indices, longest rows first.

    Each batch has as many rows as fit into `tokens_per_batch` once they are padded to the longest row of the batch, and
    at least one.

    Args:
        lengths: tokens of each row.
        tokens_per_batch: budget of one batch in tokens, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        size = max(1, tokens_per_batch // lengths[order[0]])
        yield order[:size]
        order = order[size:]
