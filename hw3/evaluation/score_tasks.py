"""Score a list of tasks, distributed over the processes, and record each entry as soon as it is finished."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from hw3.common.distributed import gather_objects, get_rank, get_world_size
from hw3.common.errors import UserError
from hw3.config.recipe import Recipe
from hw3.data.tokenization import EncodedRow, Encoder, count_unknown
from hw3.evaluation.batch_size import auto_tokens_per_batch
from hw3.evaluation.entry_statistics import compute_entry_statistics
from hw3.evaluation.scorer import RowScores, Scorer, merge_shards
from hw3.evaluation.scoring_progress import ScoringProgress
from hw3.evaluation.tasks import EvalTask, group_by_checkpoint
from hw3.modeling.adapter_io import AdapterPrefetcher, InvalidAdapterError
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.logits import verify_output_head
from hw3.runs.open_run import OpenedRun, encode_rows, load_slot
from hw3.runs.results_file import PromptReference, ScoreEntry

EncodedRows = dict[object, list[EncodedRow]]  # by `EvalTask.encoding_key`

logger = logging.getLogger(__name__)


def encode_tasks(tasks: Sequence[EvalTask], opened: OpenedRun) -> EncodedRows:
    """Encode the rows of all tasks, once per prompt and data file.

    Returns:
        The rows by `EvalTask.encoding_key`, without those of optional tasks whose prompt the model cannot take.

    Raises:
        UserError: the model does not take rows: they have too many tokens, or tokens without an embedding. Or the
            tokenizer has no chat template for the prompt.
    """
    unique: dict[object, EvalTask] = {}
    for task in tasks:
        unique.setdefault(task.encoding_key, task)
    encoded_rows: EncodedRows = {}
    refused: dict[str, list[str]] = {}  # names of prompts by the reason
    for key, task in unique.items():
        try:
            encoder = Encoder(opened.tokenizer, task.prompt)
            source = str(task.dataset.path)
            encoded_rows[key] = encode_rows(encoder, task.dataset.rows, task.examples, opened.input_limits, source)
        except UserError as error:
            if not task.is_optional:
                raise
            refused.setdefault(error.problems[0], []).append(task.prompt_name)
    for reason, names in refused.items():
        logger.warning(f"skipped prompts: {', '.join(dict.fromkeys(names))}: {reason}")
    return encoded_rows


def _prepare_base(
    encoded_rows: EncodedRows, recipe: Recipe, opened: OpenedRun, slot: AdapterSlot | None
) -> tuple[AdapterSlot, int]:
    """Return a slot with the base model, which is loaded if there is none, and the most tokens of a batch."""
    slot = slot or load_slot(recipe, dequantized=opened.identity.dequantized)
    rows = [row for encoded in encoded_rows.values() for row in encoded]
    verify_output_head(slot.model, min(rows, key=len))
    return slot, recipe.evaluation.tokens_per_batch or auto_tokens_per_batch(slot.model, max(map(len, rows)))


def score_tasks(
    tasks: Sequence[EvalTask],
    encoded_rows: EncodedRows,
    recipe: Recipe,
    opened: OpenedRun,
    slot: AdapterSlot | None = None,
) -> set[str]:
    """Score all tasks, and record their entries.

    Each process scores complete entries, so each process reads only its own adapters, and the scores are bitwise those
    of a single process. If fewer entries than processes are left, the rows of each entry are distributed. Batches then
    contain other rows, which changes scores by rounding.

    All processes gather the outcomes in the same order: for complete entries in a background thread, one round of
    `world_size` entries at a time; afterwards, for distributed rows, in the main thread.

    If the process is killed, these entries are scored again: those being scored or written at that moment, and those
    that wait for a slower process.

    Args:
        tasks: what to score.
        encoded_rows: the tasks' rows, from `encode_tasks`.
        recipe: the run's recipe.
        opened: the run.
        slot: the base model; None to load it.

    Returns:
        The hashes of the checkpoints that were skipped, because they cannot be scored; on the first process only.

    Raises:
        UserError: a row's log-likelihood is out of the dtype's range, or this architecture cannot be scored.
    """
    slot, tokens_per_batch = _prepare_base(encoded_rows, recipe, opened, slot)
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
    pending: list[Future[None]] = []

    def raise_errors_of_finished() -> None:
        for future in filter(Future.done, pending):
            future.result()

    with (
        closing(progress),
        closing(AdapterPrefetcher(adapter_dirs, pin_memory=slot.model.device.type == "cuda")) as prefetcher,
    ):
        scorer = Scorer(slot, encoded_rows, tokens_per_batch, prefetcher, progress, raise_errors_of_finished)
        _score_in_rounds(in_rounds, scorer, recorder, pending, raise_errors_of_finished)
        for task in remainder:
            recorder.record([task], [merge_shards(gather_objects(scorer.score(task, shard_rows=True)))])
    return recorder.skipped


def _score_in_rounds(
    tasks: Sequence[EvalTask],
    scorer: Scorer,
    recorder: _EntryRecorder,
    pending: list[Future[None]],
    raise_errors_of_finished: Callable[[], None],
) -> None:
    """Score one task per process in each round, and record the entries in a thread.

    A fast process then starts its next entry while others still score.

    Args:
        tasks: the tasks of all rounds.
        scorer: scores this process's task of a round.
        recorder: gathers and writes the entries.
        pending: the recordings that were started; they are appended to it.
        raise_errors_of_finished: raises the errors of recordings that have ended.
    """
    rank, world_size = get_rank(), get_world_size()
    with ThreadPoolExecutor(1) as thread:
        try:
            for first in range(0, len(tasks), world_size):
                round_tasks = tasks[first : first + world_size]
                outcome = scorer.score(round_tasks[rank])
                raise_errors_of_finished()
                pending.append(thread.submit(recorder.gather_and_record, round_tasks, outcome))
            # The thread has nothing left to gather when the main thread starts to gather.
            for future in pending:
                future.result()
        except BaseException:
            # Report the failure at once. Entries that wait for slower processes are scored again.
            thread.shutdown(wait=False, cancel_futures=world_size > 1)
            raise


class _EntryRecorder:
    """Adds finished entries to their results; on the first process only.

    Attributes:
        skipped: hashes of the checkpoints that cannot be scored.
    """

    def __init__(
        self, recipe: Recipe, encoded_rows: EncodedRows, unknown_id: int | None, progress: ScoringProgress
    ) -> None:
        self._recipe = recipe
        self._encoded_rows = encoded_rows
        self._unknown_id = unknown_id
        self._progress = progress
        self.skipped: set[str] = set()

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
                self._skip(task, outcome)
            else:
                self._add(task, outcome)

    def _skip(self, task: EvalTask, error: InvalidAdapterError) -> None:
        assert task.checkpoint is not None, "the base model has no adapter"
        if task.checkpoint.sha256 not in self.skipped:
            self.skipped.add(task.checkpoint.sha256)
            logger.warning(f"{error}; skipped")
        self._progress.count_entry()

    def _add(self, task: EvalTask, row_scores: RowScores) -> None:
        scores = [row_scores.by_index[index] for index in range(len(task.dataset.rows))]
        evaluation = self._recipe.evaluation
        encoded = self._encoded_rows[task.encoding_key]
        instructions = {row.id: row.instruction for row in task.dataset.rows}
        statistics = compute_entry_statistics(
            scores,
            instructions,
            bootstrap_samples=evaluation.bootstrap_samples,
            bootstrap_seed=evaluation.bootstrap_seed,
        )
        entry = ScoreEntry(
            key=task.entry_key,
            step=0 if task.checkpoint is None else task.checkpoint.step,
            checkpoint=None if task.checkpoint is None else task.checkpoint.name,
            shots=len(task.examples),
            prompt=PromptReference(name=task.prompt_name, sha256=task.prompt.sha256),
            example_ids=task.example_ids,
            adapter_sha256=None if task.checkpoint is None else task.checkpoint.sha256,
            **statistics,
            unknown_tokens=count_unknown(encoded, self._unknown_id),
            prompt_tokens=sum(len(row.prompt_ids) for row in encoded),
            seconds=round(row_scores.seconds, 3),
        )
        task.dataset.results.add(entry, scores)
        count = self._progress.count_entry()
        low, high = entry.mean_perplexity_ci95
        logger.info(
            f"{task.title:<16}  {entry.shots} shots  {task.prompt_name:<14}  {entry.mean_perplexity:>9.3f}  "
            f"[{low:.2f}, {high:.2f}]  {task.dataset.path}  {row_scores.seconds:.1f} s  ({count})"
        )
