"""The completion-only collator: encoded rows to one padded batch whose loss counts outputs and their EOS alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hw3.data.tokenization import IGNORE_INDEX


@dataclass(frozen=True)
class CompletionOnlyCollator:
    """Pads rows on the right and masks by length, never by id: the padding id may equal EOS, as with Llama-3.

    Attributes:
        pad_id: id written on padding; never read, it is masked everywhere.
        eos_id: the id every row must end with.
        buckets: lengths to pad to, ascending; a batch takes the least that holds it. Empty: its own longest row.
        outputs: whether to say where the outputs are, as `CapturedStep` wants to know without asking the device.
    """

    pad_id: int
    eos_id: int
    buckets: tuple[int, ...] = ()
    outputs: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B rows to length L.

        Args:
            rows: each with `input_ids` and `labels`, lists of equal length.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each int64 of shape (B, L); labels are `IGNORE_INDEX` on the
            prompt and on padding. With `outputs`, K output tokens in all: `output_positions` (indices into B * L of the
            positions that predict them) and `output_ids`, both int64 of shape (K,), and `outputs_per_row`, B numbers.

        Raises:
            ValueError: a row's lists differ in length, it has no label, a label is not its input id, labels do not run
                to the end, the last is not EOS, or the row is longer than the last bucket.
        """
        lengths = [len(row["input_ids"]) for row in rows]
        width = self._width(max(lengths))
        input_ids = torch.full((len(rows), width), self.pad_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            self._check(row)
            input_ids[index, :length] = torch.tensor(row["input_ids"])
            labels[index, :length] = torch.tensor(row["labels"])
            attention_mask[index, :length] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.outputs:
            predicted = labels[:, 1:] != IGNORE_INDEX
            row, position = predicted.nonzero(as_tuple=True)
            batch["output_positions"] = row * width + position
            batch["output_ids"] = labels[:, 1:][predicted]
            batch["outputs_per_row"] = predicted.sum(1).tolist()
        return batch

    def _width(self, longest: int) -> int:
        if not self.buckets:
            return longest
        for width in self.buckets:
            if longest <= width:
                return width
        raise ValueError(f"a row of {longest} tokens is longer than the last bucket, {self.buckets[-1]}")

    def _check(self, row: dict[str, Any]) -> None:
        ids, labels = row["input_ids"], row["labels"]
        if len(ids) != len(labels):
            raise ValueError(f"{len(ids)} input ids but {len(labels)} labels")
        prompt = next((position for position, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        if prompt == len(labels):
            raise ValueError("a row without a label would train nothing")
        if labels[prompt:] != ids[prompt:]:
            raise ValueError("after the prompt, labels must be the input ids to the end of the row")
        if labels[-1] != self.eos_id:
            raise ValueError(
                f"the last label is {labels[-1]}, not EOS {self.eos_id}: the model would never learn to stop"
            )
