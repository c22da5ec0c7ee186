"""The completion-only collator: pad encoded rows to one batch whose loss covers only the outputs and their EOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hw3.data.tokenization import IGNORE_INDEX


@dataclass(frozen=True)
class CompletionOnlyCollator:
    """Collate rows to a batch that is padded on the right, with labels on the output and its EOS only.

    Padding is masked by length and never by id, because the padding id may equal the EOS id, as with Llama-3.

    Attributes:
        pad_token_id: id that is written on padding; `attention_mask` and `labels` mask it.
        eos_token_id: id that every row must end with.
        bucket_lengths: lengths to pad to, ascending; a batch takes the smallest that its longest row fits into. If
            empty, a batch is padded to its longest row.
        return_output_positions: whether to return the positions of the output tokens as well. `CudaGraphStep` needs
            them, and reading them from `labels` would synchronize with the GPU.

    Example:
        A prompt of two ids with an output of two, and a prompt of one id with an output of one; EOS is 1, padding is 0:

        >>> collator = CompletionOnlyCollator(pad_token_id=0, eos_token_id=1)
        >>> rows = [
        ...     {"input_ids": [2, 7, 8, 9, 1], "labels": [-100, -100, 8, 9, 1]},
        ...     {"input_ids": [2, 5, 1], "labels": [-100, 5, 1]},
        ... ]
        >>> batch = collator(rows)
        >>> batch["input_ids"]
        tensor([[2, 7, 8, 9, 1],
                [2, 5, 1, 0, 0]])
        >>> batch["labels"]
        tensor([[-100, -100,    8,    9,    1],
                [-100,    5,    1, -100, -100]])
        >>> batch["attention_mask"]
        tensor([[1, 1, 1, 1, 1],
                [1, 1, 1, 0, 0]])
    """

    pad_token_id: int
    eos_token_id: int
    bucket_lengths: tuple[int, ...] = ()
    return_output_positions: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B rows to length L.

        Args:
            rows: each with `input_ids` and `labels`, lists of equal length.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each int64 of shape (B, L); `labels` are `IGNORE_INDEX` on the
            prompt and on padding. With `return_output_positions`, and K output tokens in the batch, also
            `output_positions` and `output_ids`, both int64 of shape (K,), and `outputs_per_row`, a list of B integers.
            The positions index the B * L flattened positions, and each is the one whose logits predict the output
            token.

        Raises:
            ValueError: if a row's two lists differ in length; if it has no label; if its labels, from the first one on,
                differ from its input ids; if its last label is not EOS; or if it is longer than the last bucket.
        """
        lengths = [len(row["input_ids"]) for row in rows]
        padded_length = self._padded_length(max(lengths))
        input_ids = torch.full((len(rows), padded_length), self.pad_token_id)
        labels = torch.full((len(rows), padded_length), IGNORE_INDEX)
        attention_mask = torch.zeros((len(rows), padded_length), dtype=torch.long)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            self._check_row(row)
            input_ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            attention_mask[index, :length] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.return_output_positions:
            is_predicted = labels[:, 1:] != IGNORE_INDEX
            row_indices, positions = is_predicted.nonzero(as_tuple=True)
            batch["output_positions"] = row_indices * padded_length + positions
            batch["output_ids"] = labels[:, 1:][is_predicted]
            batch["outputs_per_row"] = is_predicted.sum(1).tolist()
        return batch

    def _padded_length(self, longest: int) -> int:
        if not self.bucket_lengths:
            return longest
        for length in self.bucket_lengths:
            if longest <= length:
                return length
        raise ValueError(
            f"a row of {longest} tokens is longer than the last bucket, which has {self.bucket_lengths[-1]} tokens"
        )

    def _check_row(self, row: dict[str, Any]) -> None:
        ids, labels = row["input_ids"], row["labels"]
        if len(ids) != len(labels):
            raise ValueError(f"a row has {len(ids)} input ids but {len(labels)} labels; expected the same number")
        prompt_length = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        if prompt_length == len(labels):
            raise ValueError("a row has no label, so nothing would be learned from it; expected an output")
        if labels[prompt_length:] != ids[prompt_length:]:
            raise ValueError(
                "a row's labels differ from its input ids; expected the same ids from the output to the end"
            )
        if labels[-1] != self.eos_token_id:
            raise ValueError(
                f"the last label is {labels[-1]}; expected EOS ({self.eos_token_id}), or the model never learns to stop"
            )
