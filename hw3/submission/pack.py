"""`hw3 pack`: write the homework's submission folder from a run's checkpoint, and verify it as the grader would."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import torch

from hw3.common.disk import check_folder_is_new, format_bytes
from hw3.common.errors import RunError, UserError
from hw3.data.rows import read_rows
from hw3.evaluation.selection import ScoredCheckpoint, select_scored_checkpoint
from hw3.modeling.fingerprint import ADAPTER_WEIGHTS
from hw3.runs.run import Run
from hw3.runs.staging import staging_folder
from hw3.submission.adapter_config import build_adapter_config
from hw3.submission.fill_templates import build_predict_constants, build_utils_constants
from hw3.submission.folder import write_folder, write_readme
from hw3.submission.output_agreement import generate_reference_outputs, open_generator
from hw3.submission.verify import MAX_ADAPTER_BYTES, verify_files, verify_predictions, verify_score

NUM_SAMPLE_ROWS = 8  # rows of `data.eval` to verify outputs with if no input file is given

logger = logging.getLogger(__name__)


def pack_run(
    run: Run,
    *,
    checkpoint: str = "best",
    input_file: Path | None = None,
    output: Path | None = None,
    grader_year: str | None = None,
    url: str | None = None,
) -> int:
    """Write the submission folder, verify it in new processes, and move it to its place.

    Args:
        run: the run, scored on its `data.eval`.
        checkpoint: a checkpoint's name or step, or `best`.
        input_file: rows to predict in `prediction.json`. If None, there is no such file, and a few rows of `data.eval`
            are predicted to verify the folder.
        output: the folder to create; `RUN-pack` if None.
        grader_year: write only adapter settings that this year's grader can read.
        url: web address of the folder from which `download.sh` gets the adapter's two files.

    Returns:
        0.

    Raises:
        UserError: the run, a file or an argument does not fit, or the grader's PEFT lacks a setting of the adapter.
        RunError: the folder gives another score or other outputs, or exceeds a limit. Nothing is written.
    """
    scored = select_scored_checkpoint(run, checkpoint)
    output = output or run.folder_beside("-pack")
    check_folder_is_new(output, "OUTPUT= (--output)")
    adapter_config = build_adapter_config(scored, grader_year)
    _check_adapter_size(scored)
    source = input_file or scored.data_file
    rows = read_rows(source, require_output=False)[: None if input_file else NUM_SAMPLE_ROWS]
    tokenizer = run.load_tokenizer(scored.recipe)
    with staging_folder(output) as staging:
        folder = staging / "pack"
        logger.info(f"{source}: predicting {len(rows)} rows, first with hw3, then with only the folder's files")
        generator = open_generator(scored)
        reference = generate_reference_outputs(generator, rows, source)
        utils, predict = build_utils_constants(scored.recipe, tokenizer), build_predict_constants(generator)
        write_folder(folder, scored, adapter_config, {"utils.py": utils, "predict.py": predict}, url)
        # The processes that verify the folder need the model's memory.
        del generator
        gc.collect()
        torch.cuda.empty_cache()
        try:
            lines = [verify_score(folder, scored, tokenizer)]
            lines += verify_predictions(folder, scored, rows, reference, keep_file=input_file is not None)
            write_readme(folder, scored, input_file, grader_year)
            lines.append(verify_files(folder))
        except RunError as error:
            raise RunError(f"{error}\n{output} was not written") from error
        os.rename(folder, output)
    print(f"{output}: {scored.checkpoint.name} of {run}", *lines, sep="\n  ")
    return 0


def _check_adapter_size(scored: ScoredCheckpoint) -> None:
    file = scored.checkpoint.path / ADAPTER_WEIGHTS
    size = file.stat().st_size
    if size > MAX_ADAPTER_BYTES:
        raise UserError(f"{file}: {format_bytes(size)}; the course allows {format_bytes(MAX_ADAPTER_BYTES)}")
