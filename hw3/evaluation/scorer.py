"""Score one entry with the loaded base model, swapping adapters in and out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from hw3.common.distributed import own_share, rank
from hw3.common.errors import UserError
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.jobs import Job
from hw3.evaluation.perplexity import RowScore, score_rows
from hw3.modeling.adapter_io import BadAdapter, ReadAhead
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.open_run import load_checkpoint

Scored = tuple[dict[int, RowScore], float]  # scores by the row's number, and seconds


class Scorer:
    """The loaded base, and the checkpoint that is in it.

    Args:
        model: the base.
        encoded: rows by a job's text.
        budget: most tokens of a padded batch.
        ahead: the adapters of the jobs that this process will score, in their order.
        check: called after each batch; may raise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoded: dict[tuple[Any, ...], list[EncodedRow]],
        budget: int,
        ahead: ReadAhead,
        check: Callable[[], None],
    ) -> None:
        self._model, self._encoded, self._budget, self._ahead, self._check = model, encoded, budget, ahead, check
        self._slot = AdapterSlot(model)
        self._held: Path | None = None
        self._bad: dict[Path, BadAdapter] = {}

    def score(self, job: Job, *, shared: bool = False) -> Scored | BadAdapter | UserError:
        """One job, or this process's share of its rows; or what is wrong with its checkpoint or its figures."""
        rows = self._encoded[job.text]
        own = own_share([len(row) for row in rows]) if shared else range(len(rows))
        try:
            if job.checkpoint is not None:
                self._hold(job.checkpoint)
            began = time.perf_counter()
            hidden = True if rank() else None  # on the first process's terminal alone
            with tqdm(total=len(own), desc=job.title, unit="row", disable=hidden, leave=False) as bar:

                def progressed(count: int) -> None:
                    bar.update(count)
                    self._check()

                taken = [rows[at] for at in own]
                scores = (
                    score_rows(self._model, taken, tokens_per_batch=self._budget, on_batch=progressed) if own else []
                )
        except (BadAdapter, UserError) as error:
            return error
        return dict(zip(own, scores, strict=True)), time.perf_counter() - began

    def _hold(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint's weights in the base; a bad one's jobs all end with what was wrong with it at first."""
        folder = checkpoint.path
        if folder in self._bad:
            raise self._bad[folder]
        if folder == self._held:
            return
        self._held = None
        try:
            adapter = self._ahead.take(folder) if folder in self._ahead.folders else None
            load_checkpoint(self._slot, self._model, checkpoint, adapter)
        except BadAdapter as error:
            self._bad[folder] = error
            raise
        self._held = folder


def merge_shards(shares: list[Scored | BadAdapter]) -> Scored | BadAdapter:
    """All rows of an entry, and the longest time that a process took."""
    bad = next((share for share in shares if isinstance(share, BadAdapter)), None)
    if bad is not None:
        return bad
    return {at: score for scores, _ in shares for at, score in scores.items()}, max(seconds for _, seconds in shares)
