"""`hw3 predict`: predictions of a checkpoint for a file of rows, saved one by one, and their metrics."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hw3.common.atomic_io import write_atomically, write_json
from hw3.common.distributed import gather_objects, get_rank, get_world_size, shard_by_cost
from hw3.common.errors import RunError, UserError
from hw3.common.hashing import file_sha256
from hw3.common.paths import shown_path
from hw3.common.progress import ProgressLine
from hw3.config.recipe import Recipe
from hw3.config.schema import GenerationSection
from hw3.data.fingerprint import DatasetFingerprint, dataset_fingerprint
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import EncodedRow
from hw3.evaluation.translation_metrics import compute_metrics, metrics_of_copying, print_metrics
from hw3.generation.batch_generate import Generation, generate
from hw3.generation.generator import RunGenerator
from hw3.generation.partial_predictions import PartialPredictions, Prediction, remove_partial_predictions
from hw3.runs.identity import prompt_name
from hw3.runs.lock import exclusive_lock
from hw3.runs.open_run import encode_rows
from hw3.runs.output_file import check_output_file, list_recipe_inputs
from hw3.runs.prediction_record import PredictionRecord, read_outputs
from hw3.runs.results_file import PromptReference
from hw3.runs.run import RECORD_SUFFIX, Run

logger = logging.getLogger(__name__)


def predict_run(
    run: Run,
    input_file: Path | None = None,
    *,
    overrides: list[str] | None = None,
    checkpoint: str = "best",
    shots: int = 0,
    output: Path | None = None,
    allow_mismatch: bool = False,
) -> int:
    """Generate an output for every row of a file, save the predictions in the run folder, and print their metrics.

    Writes `RUN/predictions/<file stem>/<checkpoint>.json` and `<checkpoint>.quality.json`. A call after an interruption
    continues, and a call with nothing new generates nothing.

    Args:
        run: the run.
        input_file: rows, with or without outputs; the recipe's `data.eval` if None.
        overrides: `generation.key=value` assignments.
        checkpoint: `best`, `last`, `base`, a checkpoint's name, or the path of a checkpoint or of any PEFT adapter.
        shots: number of few-shot examples in the prompt.
        output: also copy the predictions to this file.
        allow_mismatch: use checkpoints that were trained with another prompt, base model or quantization.

    Returns:
        0.

    Raises:
        UserError: there is no such run, checkpoint or file, or they do not fit together.
    """
    # --- what to generate ---------------------------------------------------------------------------------------------
    generator = RunGenerator.open(run, checkpoint, shots=shots, overrides=overrides, allow_mismatch=allow_mismatch)
    inputs = _load_inputs(generator, input_file or Path(generator.recipe.data.eval))
    _check_output(output, inputs.path, generator.recipe)
    predictions_path = run.predictions_dir(inputs.path, inputs.data) / f"{generator.name}.json"
    key = _predictions_key(generator, inputs)

    # --- generate -----------------------------------------------------------------------------------------------------
    # The first process decides: another one may read files while the first process replaces them.
    record = gather_objects(_read_complete_record(predictions_path, key))[0]
    if record is None:
        with _lock_predictions(predictions_path):
            record = _generate_and_save(generator, inputs, predictions_path, key)
    else:
        logger.info(f"{shown_path(predictions_path)}: already complete")
    if get_rank() != 0:
        return 0

    # --- report -------------------------------------------------------------------------------------------------------
    assert record is not None, "the first process has the record"
    record = _with_metrics(record, inputs, read_outputs(predictions_path))
    _save_record(record, predictions_path)
    _print_metrics(record)
    if output is not None:
        _copy_predictions(predictions_path, output)
    print(f"{output or shown_path(predictions_path)}: {len(inputs.rows)} predictions of {generator.name}")
    return 0


def _lock_predictions(predictions_path: Path) -> AbstractContextManager[None]:
    """Lock a file of predictions in the first process. If it is refused, the launcher ends the others."""
    if get_rank() != 0:
        return contextlib.nullcontext()
    lock_file = predictions_path.with_name(f".{predictions_path.stem}.lock")
    return exclusive_lock(lock_file, shown_path(predictions_path))


def _generate_and_save(
    generator: RunGenerator, inputs: _Inputs, predictions_path: Path, key: str
) -> PredictionRecord | None:
    """Generate the missing predictions, and write all; return their record in the first process."""
    partial = PartialPredictions.open(predictions_path, key)
    _generate_missing(generator, inputs, partial)
    partial.gather()
    if get_rank() != 0:
        return None
    write_json(predictions_path, [{"id": row.id, "output": partial.by_id[row.id].output} for row in inputs.rows])
    return _build_record(generator, inputs, partial, key, file_sha256(predictions_path))


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The rows to generate for.

    Attributes:
        path: their file.
        data: fingerprint of the file.
        rows: the rows.
        encoded: token ids by row.
        limits: limit of new tokens by row, EOS included.
    """

    path: Path
    data: DatasetFingerprint
    rows: list[Row]
    encoded: list[EncodedRow]
    limits: list[int]


def _load_inputs(generator: RunGenerator, path: Path) -> _Inputs:
    rows = read_rows(path, require_output=False)
    logger.info(generator.selection)
    encoded = encode_rows(generator.encoder, rows, generator.examples, generator.input_limits, str(path))
    limits = [generator.get_max_new_tokens(row, ids) for row, ids in zip(rows, encoded, strict=True)]
    return _Inputs(path, dataset_fingerprint(path, rows), rows, encoded, limits)


def _check_output(output: Path | None, input_file: Path, recipe: Recipe) -> None:
    if output is not None:
        check_output_file(output, "--output", [input_file, *list_recipe_inputs(recipe)])


def _predictions_key(generator: RunGenerator, inputs: _Inputs) -> str:
    section = generator.recipe.generation
    return generator.key(
        rows=[(row.id, row.instruction) for row in inputs.rows],
        limits=inputs.limits,
        generation=section.model_dump(exclude_none=True),
        seed=generator.recipe.seed if section.do_sample else None,
    )


def _read_complete_record(predictions_path: Path, key: str) -> PredictionRecord | None:
    """Return the record of complete predictions with this key; None if there are none, or if they were edited."""
    try:
        record = PredictionRecord.read(predictions_path.with_suffix(RECORD_SUFFIX))
        is_unchanged = file_sha256(predictions_path) == record.predictions_sha256
    except (OSError, UserError):
        return None
    return record if is_unchanged and record.key == key else None


def _generate_missing(generator: RunGenerator, inputs: _Inputs, partial: PartialPredictions) -> None:
    """Generate this process's shard of the missing predictions, and save each as soon as it is finished."""
    rows, limits = inputs.rows, inputs.limits
    missing = [index for index, row in enumerate(rows) if row.id not in partial.by_id]
    _log_plan(inputs, len(missing), generator.recipe.generation)
    shard = [missing[position] for position in sorted(shard_by_cost([limits[index] for index in missing]))]
    if not shard:
        return
    model, generation_config = generator.model, generator.generation_config
    if generation_config.do_sample:
        torch.manual_seed(generator.recipe.seed + get_rank())
    num_before = len(partial.by_id)
    started = time.perf_counter()
    with (
        partial.path.open("a", encoding="utf-8") as file,
        ProgressLine("predict", num_before + len(shard), "rows", initial=num_before, is_logged=True) as progress,
    ):

        def save(position: int, generation: Generation) -> None:
            nonlocal started
            now = time.perf_counter()
            # Divided, so that the sum over the predictions of all processes is the elapsed time.
            seconds = round((now - started) / get_world_size(), 6)
            started = now
            output = generator.encoder.decode(generation.token_ids)
            partial.add(Prediction(rows[shard[position]].id, output, generation.finished, seconds), file)
            progress.advance()

        try:
            generate(
                model,
                [inputs.encoded[index] for index in shard],
                max_new_tokens=[limits[index] for index in shard],
                generation_config=generation_config,
                on_generation=save,
            )
        except KeyboardInterrupt:
            progress.close()
            _log_stopped(len(partial.by_id), len(rows))
            raise
        os.fsync(file.fileno())


def _log_plan(inputs: _Inputs, num_missing: int, section: GenerationSection) -> None:
    num_before = len(inputs.rows) - num_missing
    before = f", {num_before} already predicted" if num_before else ""
    processes = f", shared by {get_world_size()} processes" if get_world_size() > 1 else ""
    values = section.model_dump(exclude_defaults=True, exclude={"max_new_tokens"})
    strategy = ", ".join(f"{key} {value}" for key, value in values.items()) or "greedy"
    low, high = min(inputs.limits), max(inputs.limits)
    limit = str(low) if low == high else f"{low} to {high}"
    logger.info(f"{len(inputs.rows)} rows of {inputs.path}{before}{processes}; {strategy}, at most {limit} new tokens")


def _log_stopped(num_saved: int, num_rows: int) -> None:
    others = ", besides those of the other processes" if get_world_size() > 1 else ""
    logger.warning(
        f"stopped: {num_saved} of {num_rows} predictions are saved{others}; run the same command to continue"
    )


def _build_record(
    generator: RunGenerator, inputs: _Inputs, partial: PartialPredictions, key: str, predictions_sha256: str
) -> PredictionRecord:
    """Return the record of new predictions, without metrics."""
    prompt, checkpoint = generator.recipe.prompt, generator.checkpoint
    predictions = partial.by_id.values()
    seconds = sum(prediction.seconds for prediction in predictions)
    low, high = min(inputs.limits), max(inputs.limits)
    generation: dict[str, Any] = generator.recipe.generation.model_dump(exclude_none=True)
    generation["max_new_tokens"] = low if low == high else [low, high]
    generation["eos_token_id"] = generator.generation_config.eos_token_id
    return PredictionRecord(
        key=key,
        run=generator.run.name,
        data=inputs.data,
        name=generator.name,
        checkpoint=None if checkpoint is None else checkpoint.name,
        adapter_sha256=None if checkpoint is None else checkpoint.sha256,
        shots=len(generator.examples),
        prompt=PromptReference(name=prompt_name(prompt), sha256=prompt.sha256),
        generation=generation,
        seconds=round(seconds, 3),
        rows_per_second=round(len(predictions) / seconds, 3),
        unfinished_ids=sorted(prediction.id for prediction in predictions if not prediction.finished),
        predictions_sha256=predictions_sha256,
        groups={},
        copy_input={},
    )


def _with_metrics(record: PredictionRecord, inputs: _Inputs, outputs: dict[str, str]) -> PredictionRecord:
    """Return the record with metrics against the file's current reference outputs.

    A change of these outputs does not change the predictions' key.
    """
    return record.model_copy(
        update={
            "data": inputs.data,
            "groups": compute_metrics(inputs.rows, outputs, frozenset(record.unfinished_ids)),
            "copy_input": metrics_of_copying(inputs.rows),
        }
    )


def _save_record(record: PredictionRecord, predictions_path: Path) -> None:
    """Write the record unless it would stay the same, and delete the partial predictions, which are complete now."""
    path = predictions_path.with_suffix(RECORD_SUFFIX)
    if not path.exists() or path.read_text(encoding="utf-8") != record.to_json():
        record.write(path)
    remove_partial_predictions(predictions_path)


def _print_metrics(record: PredictionRecord) -> None:
    unfinished = record.unfinished_ids
    if record.groups:
        print_metrics(record.groups, record.copy_input)
    elif unfinished:
        print(
            f"{len(unfinished)} predictions were cut because the model did not end them; the first is {unfinished[0]}"
        )


def _copy_predictions(predictions_path: Path, output: Path) -> None:
    try:
        write_atomically(output, predictions_path.read_text(encoding="utf-8"))
    except RunError as error:
        raise UserError(f"--output {error}; the predictions are saved in {shown_path(predictions_path)}") from error
