"""`hw3 verify`: check that a run's files are intact, and that its figures follow from its rows."""

from __future__ import annotations

import logging
from pathlib import Path

from hw3.common.hashing import file_sha256
from hw3.common.paths import shown_path
from hw3.common.shell_commands import hw3_command
from hw3.config.recipe import Recipe
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.batch_size import auto_tokens_per_batch
from hw3.evaluation.entry_statistics import compute_entry_statistics
from hw3.evaluation.perplexity import RowScore, score_rows
from hw3.evaluation.results import EvalResults
from hw3.evaluation.selection import select_checkpoint
from hw3.modeling.adapter_io import InvalidAdapterError
from hw3.modeling.logits import verify_output_head
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.manifest import Manifest
from hw3.runs.open_run import encode_rows, load_checkpoint, load_slot, open_run
from hw3.runs.results_file import ScoreEntry, finetuned_entries, select_best_entry
from hw3.runs.run import Run

# Largest relative difference of a row's perplexity when it is scored again, on any machine.
MAX_DIFFERENCE = {"float32": 1e-3}
MAX_DIFFERENCE_IN_16_BITS = 0.1

logger = logging.getLogger(__name__)


def verify_run(run: Run) -> int:
    """Check a run's files and figures; print what was checked, and report each problem.

    Checked are the checksums of all complete checkpoints, the data files against the manifest, the figures of all
    entries against `rows.parquet`, the checksums of predictions, and the scores of one checkpoint, which is scored
    again.

    Args:
        run: the run.

    Returns:
        0, or 1 if there is a problem.

    Raises:
        UserError: there is no such run, or one of its files cannot be read.
    """
    recipe, manifest = run.load_recipe(), run.read_manifest()
    problems: list[str] = []
    problems += _check_checkpoints(run)
    if manifest is not None:
        problems += _check_data_files(run, recipe, manifest)
    problems += _check_predictions(run)
    all_results = _read_all_results(run, recipe, manifest)
    for results in all_results:
        problems += _check_figures(run, recipe, results)
    problems += _score_again(run, recipe, all_results)
    for problem in problems:
        logger.error(problem)
    print(f"{run}: {'intact' if not problems else f'{len(problems)} problems, listed above'}")
    return 1 if problems else 0


def _check_checkpoints(run: Run) -> list[str]:
    problems = [f"{folder}: incomplete" for folder in run.incomplete_checkpoints()]
    checkpoints = run.complete_checkpoints()
    for checkpoint in checkpoints:
        problems += [
            f"{checkpoint.path / name}: does not have its recorded checksum"
            for name in checkpoint.find_damaged_files(only_weights=not checkpoint.resumable)
        ]
    print(f"checkpoints: the checksums of {len(checkpoints)} compared")
    return problems


def _check_data_files(run: Run, recipe: Recipe, manifest: Manifest) -> list[str]:
    problems, compared = [], 0
    for key, path in run.data_files(recipe).items():
        if key not in manifest.data:
            continue
        if not path.is_file():
            logger.info(f"{path}: not here, so it is not compared")
            continue
        compared += 1
        if file_sha256(path) != manifest.data[key].sha256:
            problems.append(f"{path}: has changed since the run began")
    print(f"data files: {compared} of {len(manifest.data)} compared with the manifest")
    return problems


def _check_predictions(run: Run) -> list[str]:
    records = run.read_prediction_records()
    print(f"predictions: the checksums of {len(records)} files compared")
    return [
        f"{path}: edited since it was generated"
        for path, record in records
        if file_sha256(path) != record.predictions_sha256
    ]


def _read_all_results(run: Run, recipe: Recipe, manifest: Manifest | None) -> list[EvalResults]:
    started = None if manifest is None else manifest.started
    return [EvalResults.read(folder, recipe.prompt.sha256, started) for folder in run.read_results()]


def _check_figures(run: Run, recipe: Recipe, results: EvalResults) -> list[str]:
    """Compute the figures of all entries on a data file again, from `rows.parquet`."""
    rows = _find_rows(run, recipe, results)
    if rows is None:
        logger.info(f"{results.data.path}: not here, or changed, so the figures on it are not compared")
        return []
    instructions = {row.id: row.instruction for row in rows}
    present = {checkpoint.name: checkpoint.sha256 for checkpoint in run.complete_checkpoints()}
    problems = []
    for entry in results.entries:
        name = f"{results.folder}: {entry.label}, prompt {entry.prompt.name}"
        if entry.checkpoint in present and present[entry.checkpoint] != entry.adapter_sha256:
            command = hw3_command("eval", run)
            problems.append(f"{name}: the scores are those of other weights than the checkpoint's; run {command}")
        scores = results.row_scores[entry.key]
        if [score.id for score in scores] != [row.id for row in rows]:
            problems.append(f"{name}: rows.parquet has other rows than {results.data.path}")
            continue
        problems += [
            f"{name}: {field} is {getattr(entry, field)}, but the rows give {value}"
            for field, value in _compute_figures(results, scores, instructions).items()
            if getattr(entry, field) != value
        ]
    problems += _check_best(results)
    print(f"{results.folder}: the figures of {len(results.entries)} entries computed again from their rows")
    return problems


def _compute_figures(results: EvalResults, scores: list[RowScore], instructions: dict[str, str]) -> dict[str, object]:
    settings = results.settings
    return compute_entry_statistics(
        scores,
        instructions,
        bootstrap_samples=settings.bootstrap_samples,
        bootstrap_seed=settings.bootstrap_seed,
    )


def _check_best(results: EvalResults) -> list[str]:
    stored = results.read_stored_best()
    if stored is None or stored.chosen_on != results.data.path:  # selected on another file
        return []
    best = select_best_entry(results.entries, results.prompt_sha256, stored.chosen_by)
    if best is not None and (best.step, best.mean_perplexity) == (stored.step, stored.mean_perplexity):
        return []
    return [f"{results.folder}: best is {stored.checkpoint}, which does not have the lowest {stored.criterion}"]


def _find_rows(run: Run, recipe: Recipe, results: EvalResults) -> list[Row] | None:
    """Return the rows that were scored; None if their file is not here or has changed."""
    for path in [Path(results.data.path), *run.data_files(recipe).values()]:
        if path.is_file() and file_sha256(path) == results.data.sha256:
            return read_rows(path)
    return None


def _score_again(run: Run, recipe: Recipe, all_results: list[EvalResults]) -> list[str]:
    """Score one checkpoint again, the best or the last that has scores, and compare each row."""
    found = _select_entry(run, recipe, all_results)
    if found is None:
        logger.info("no checkpoint with scores, so none is scored again")
        return []
    checkpoint, results, entry, rows = found
    opened = open_run(run, recipe)
    encoded = encode_rows(Encoder(opened.tokenizer, recipe.prompt), rows, [], opened.input_limits, results.data.path)
    slot = load_slot(recipe, dequantized=opened.identity.dequantized)
    verify_output_head(slot.model, min(encoded, key=len))
    try:
        load_checkpoint(slot, checkpoint)
    except InvalidAdapterError as error:
        return [str(error)]
    tokens_per_batch = recipe.evaluation.tokens_per_batch or auto_tokens_per_batch(slot.model, max(map(len, encoded)))
    scores = score_rows(slot.model, encoded, tokens_per_batch=tokens_per_batch)
    limit = MAX_DIFFERENCE.get(recipe.model.dtype, MAX_DIFFERENCE_IN_16_BITS)
    differences = {
        score.id: abs(score.perplexity / stored.perplexity - 1)
        for score, stored in zip(scores, results.row_scores[entry.key], strict=True)
    }
    row_id, largest = max(differences.items(), key=lambda item: item[1])
    print(f"{checkpoint.name}: {len(rows)} rows scored again; the largest difference of a perplexity is {largest:.2g}")
    if not largest <= limit:  # also true for NaN
        return [
            f"{shown_path(checkpoint.path)}: row {row_id} has another perplexity than the saved one, by "
            f"{largest:.1%}; rounding explains {limit:.1%}"
        ]
    return []


def _select_entry(
    run: Run, recipe: Recipe, all_results: list[EvalResults]
) -> tuple[Checkpoint, EvalResults, ScoreEntry, list[Row]] | None:
    complete = {checkpoint.name: checkpoint for checkpoint in run.complete_checkpoints()}
    if not complete:
        return None
    best, _ = select_checkpoint(run, recipe, "best")
    for results in all_results:
        rows = _find_rows(run, recipe, results)
        entries = {e.checkpoint: e for e in finetuned_entries(results.entries, results.prompt_sha256)}
        names = [best.name if best else None, *reversed(entries)]
        name = next((name for name in names if name in entries and name in complete), None)
        if rows is not None and name is not None:
            return complete[name], results, entries[name], rows
    return None
