"""Score single entries with the base model, exchanging the checkpoint in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hw3.common.distributed import shard_by_cost
from hw3.common.errors import UserError
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.perplexity import RowScore, score_rows
from hw3.evaluation.scoring_progress import ScoringProgress
from hw3.evaluation.tasks import EvalTask
from hw3.modeling.adapter_io import AdapterPrefetcher, InvalidAdapterError
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.open_run import load_checkpoint


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of an entry's rows, or of one process's shard of them.

    Attributes:
        by_index: score by the row's index in the data file.
        seconds: time to score them.
    """

    by_index: dict[int, RowScore]
    seconds: float


class Scorer:
    """A slot with the loaded base model, and the checkpoint that is in it.

    Args:
        slot: the slot, without a checkpoint.
        encoded_rows: encoded rows by `EvalTask.encoding_key`.
        tokens_per_batch: most tokens of a padded batch.
        prefetcher: reads the adapters of the tasks that this process will score, in their order.
        progress: shows the rows that have been scored.
        on_batch: called after each batch. It may raise to stop.
    """

    def __init__(
        self,
        slot: AdapterSlot,
        encoded_rows: Mapping[object, list[EncodedRow]],
        tokens_per_batch: int,
        prefetcher: AdapterPrefetcher,
        progress: ScoringProgress,
        on_batch: Callable[[], None],
    ) -> None:
        self._slot = slot
        self._encoded_rows = encoded_rows
        self._tokens_per_batch = tokens_per_batch
        self._prefetcher = prefetcher
        self._progress = progress
        self._on_batch = on_batch
        self._loaded: Path | None = None
        self._invalid: dict[Path, str] = {}

    def score(self, task: EvalTask, *, shard_rows: bool = False) -> RowScores | InvalidAdapterError | UserError:
        """Score one task.

        Errors are returned, not raised, so that all processes learn of them when the outcomes are gathered.

        Args:
            task: the task.
            shard_rows: score only this process's shard of the rows.

        Returns:
            The scores, or what is wrong with the checkpoint or its log-likelihoods. A `UserError` is about the base.
        """
        rows = self._encoded_rows[task.encoding_key]
        indices = shard_by_cost([len(row) for row in rows]) if shard_rows else range(len(rows))
        self._progress.start_entry(task.title, len(indices))
        try:
            if task.checkpoint is not None:
                self._load(task.checkpoint)
            started = time.perf_counter()
            scores = self._score_rows([rows[index] for index in indices])
        except InvalidAdapterError as error:
            return InvalidAdapterError(str(error))  # without the traceback, which refers to the base model
        except UserError as error:
            if task.checkpoint is None:
                return error
            return InvalidAdapterError(f"{task.checkpoint.path}: {error}")
        finally:
            self._progress.finish_entry()
        return RowScores(dict(zip(indices, scores, strict=True)), time.perf_counter() - started)

    def _score_rows(self, rows: list[EncodedRow]) -> list[RowScore]:
        def advance(count: int) -> None:
            self._progress.add_rows(count)
            self._on_batch()

        if not rows:
            return []
        return score_rows(self._slot.model, rows, tokens_per_batch=self._tokens_per_batch, on_batch=advance)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights into the base model.

        Raises:
            InvalidAdapterError: the checkpoint is invalid; every further task of it raises the same error.
        """
        folder = checkpoint.path
        if folder in self._invalid:
            raise InvalidAdapterError(self._invalid[folder])
        if folder == self._loaded:
            return
        self._loaded = None
        try:
            adapter = self._prefetcher.get(folder) if folder in self._prefetcher.folders else None
            load_checkpoint(self._slot, checkpoint, adapter)
        except InvalidAdapterError as error:
            self._invalid[folder] = str(error)
            raise
        self._loaded = folder


def merge_shards(shards: Sequence[RowScores | InvalidAdapterError]) -> RowScores | InvalidAdapterError:
    """Return all rows of an entry from the processes' shards, with the time of the slowest process."""
    merged: dict[int, RowScore] = {}
    seconds = 0.0
    for shard in shards:
        if isinstance(shard, InvalidAdapterError):
            return shard
        merged |= shard.by_index
        seconds = max(seconds, shard.seconds)
    return RowScores(merged, seconds)
