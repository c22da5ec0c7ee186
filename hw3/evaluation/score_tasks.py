"""Score a list of tasks, distributed over the processes, and record each entry as soon as it is finished."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from hw3.common.distributed import gather_objects, get_rank, get_world_size
from hw3.config.recipe import Recipe
from hw3.data.tokenization import EncodedRow, Encoder, count_unknown
from hw3.evaluation.batch_size import auto_tokens_per_batch
from hw3.evaluation.bootstrap import bootstrap_interval
from hw3.evaluation.breakdown import scores_by_direction, scores_by_length, top_contributors
from hw3.evaluation.perplexity import summarize
from hw3.evaluation.scorer import RowScores, Scorer, merge_shards
from hw3.evaluation.scoring_progress import ScoringProgress
from hw3.evaluation.tasks import EvalTask, group_by_checkpoint
from hw3.modeling.adapter_io import AdapterPrefetcher, InvalidAdapterError
from hw3.modeling.logits import verify_output_head
from hw3.runs.open_run import OpenedRun, encode_rows, load_for_inference
from hw3.runs.results_file import PromptReference, ScoreEntry

EncodedRows = dict[object, list[EncodedRow]]  # by `EvalTask.encoding_key`

logger = logging.getLogger(__name__)


def encode_tasks(tasks: Sequence[EvalTask], opened: OpenedRun) -> EncodedRows:
    """Encode the rows of all tasks, once per prompt and data file.

    Raises:
        UserError: rows have more tokens than the model takes.
    """
    encoded_rows: EncodedRows = {}
    for task in tasks:
        if task.encoding_key not in encoded_rows:
            encoder = Encoder(opened.tokenizer, task.prompt)
            source = str(task.dataset.path)
            encoded_rows[task.encoding_key] = encode_rows(
                encoder, task.dataset.rows, task.examples, opened.max_positions, source
            )
    return encoded_rows


def score_tasks(tasks: Sequence[EvalTask], encoded_rows: EncodedRows, recipe: Recipe, opened: OpenedRun) -> None:
    """Load the base model, score all tasks, and record their entries.

    Each process scores complete entries, so each process reads only its own adapters, and the scores are bitwise those
    of a single process. If fewer entries than processes are left, the rows of each entry are distributed. Batches then
    contain other rows, which changes scores by rounding.

    All processes gather the outcomes in the same order: for complete entries in a background thread, one round of
    `world_size` entries at a time; afterwards, for distributed rows, in the main thread.

    If the process is killed, these entries are scored again: those being scored or written at that moment, and those
    that wait for a slower process.

    Raises:
        UserError: a row's log-likelihood is out of the dtype's range, or this architecture cannot be scored.
    """
    model = load_for_inference(recipe, dequantized=opened.identity.dequantized)
    verify_output_head(model, min(encoded_rows[tasks[0].encoding_key], key=len))
    longest_row = max(len(row) for rows in encoded_rows.values() for row in rows)
    tokens_per_batch = recipe.evaluation.tokens_per_batch or auto_tokens_per_batch(model, longest_row)

    ordered = list(group_by_checkpoint(tasks))
    rank, world_size = get_rank(), get_world_size()
    num_in_rounds = len(ordered) - len(ordered) % world_size
    in_rounds, remainder = ordered[:num_in_rounds], ordered[num_in_rounds:]
    own_tasks = [*in_rounds[rank::world_size], *remainder]
    checkpoints = {task.checkpoint_dir: task.checkpoint for task in own_tasks if task.checkpoint is not None}
    adapter_dirs = [folder for folder, checkpoint in checkpoints.items() if folder and checkpoint.is_adapter]
    num_rows = sum(len(encoded_rows[task.encoding_key]) for task in in_rounds[rank::world_size])
    num_rows += sum(len(encoded_rows[task.encoding_key][rank::world_size]) for task in remainder)
    progress = ScoringProgress(len(tasks), num_rows)
    recorder = _EntryRecorder(recipe, encoded_rows, opened.tokenizer.unk_token_id, progress)
    with (
        closing(progress),
        closing(AdapterPrefetcher(adapter_dirs, pin_memory=model.device.type == "cuda")) as prefetcher,
        ThreadPoolExecutor(1) as thread,
    ):
        pending: list[Future[None]] = []

        def raise_errors_of_finished() -> None:
            for future in filter(Future.done, pending):
                future.result()

        scorer = Scorer(model, encoded_rows, tokens_per_batch, prefetcher, progress, raise_errors_of_finished)
        try:
            # A thread gathers and writes, so that a fast process starts its next entry while others still score.
            for first in range(0, num_in_rounds, world_size):
                round_tasks = in_rounds[first : first + world_size]
                outcome = scorer.score(round_tasks[rank])
                raise_errors_of_finished()
                pending.append(thread.submit(recorder.gather_and_record, round_tasks, outcome))
            # The thread has nothing left to gather when the main thread starts to gather.
            for future in pending:
                future.result()
            for task in remainder:
                recorder.record([task], [merge_shards(gather_objects(scorer.score(task, shard_rows=True)))])
        except BaseException:
            # Report the failure at once. Entries that wait for slower processes are scored again.
            thread.shutdown(wait=False, cancel_futures=world_size > 1)
            raise


class _EntryRecorder:
    """Adds finished entries to their results; on the first process only."""

    def __init__(
        self, recipe: Recipe, encoded_rows: EncodedRows, unknown_id: int | None, progress: ScoringProgress
    ) -> None:
        self._recipe = recipe
        self._encoded_rows = encoded_rows
        self._unknown_id = unknown_id
        self._progress = progress
        self._skipped: set[Path | None] = set()

    def gather_and_record(self, tasks: Sequence[EvalTask], outcome: object) -> None:
        """Gather the outcomes of all processes, one per task, and record them."""
        self.record(tasks, gather_objects(outcome))

    def record(self, tasks: Sequence[EvalTask], outcomes: Sequence[RowScores | InvalidAdapterError]) -> None:
        """Add an entry per task, and report its score. An invalid checkpoint is reported once and skipped."""
        # `outcomes` contains no UserError: `gather_objects` has raised it.
        if get_rank() != 0:
            return
        for task, outcome in zip(tasks, outcomes, strict=True):
            if isinstance(outcome, InvalidAdapterError):
                if task.checkpoint_dir not in self._skipped:
                    self._skipped.add(task.checkpoint_dir)
                    logger.warning(f"{outcome}; skipped")
                self._progress.count_entry()
                continue
            self._add(task, outcome)

    def _add(self, task: EvalTask, row_scores: RowScores) -> None:
        scores = [row_scores.by_index[index] for index in range(len(task.dataset.rows))]
        evaluation = self._recipe.evaluation
        unknown_tokens = count_unknown(self._encoded_rows[task.encoding_key], self._unknown_id)
        instructions = {row.id: row.instruction for row in task.dataset.rows}
        low, high = bootstrap_interval(
            [score.perplexity for score in scores],
            samples=evaluation.bootstrap_samples,
            seed=evaluation.bootstrap_seed,
        )
        entry = ScoreEntry(
            key=task.entry_key,
            step=0 if task.checkpoint is None else task.checkpoint.step,
            checkpoint=None if task.checkpoint is None else task.checkpoint.name,
            shots=len(task.examples),
            prompt=PromptReference(name=task.prompt_name, sha256=task.prompt.sha256),
            example_ids=task.example_ids,
            adapter_sha256=None if task.checkpoint is None else task.checkpoint.sha256,
            mean_perplexity_ci95=(low, high),
            **asdict(summarize(scores)),
            unknown_tokens=unknown_tokens,
            by_direction=scores_by_direction(scores, instructions),
            by_length=scores_by_length(scores),
            top_contributors=top_contributors(scores),
            seconds=round(row_scores.seconds, 3),
        )
        task.dataset.results.add(entry, scores)
        count = self._progress.count_entry()
        logger.info(
            f"{task.title:<16}  {entry.shots} shots  {task.prompt_name:<14}  {entry.mean_perplexity:>9.3f}  "
            f"[{low:.2f}, {high:.2f}]  {task.dataset.path}  {row_scores.seconds:.1f} s  ({count})"
        )
