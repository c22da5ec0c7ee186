"""Verify a submission folder as the homework's grader would: new processes, only its own files, the course's limits."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

import hw3
from hw3.common.atomic_io import write_json
from hw3.common.disk import format_bytes
from hw3.common.errors import RunError
from hw3.data.prompt import PLACEHOLDER
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.selection import ScoredCheckpoint
from hw3.modeling.devices import select_device
from hw3.submission.folder import ADAPTER_DIR, PREDICTION_FILE, SUBMISSION_FILES
from hw3.submission.grader_encoding import encode_as_grader
from hw3.submission.output_agreement import ReferenceOutputs, compare_outputs

# The course's limits.
MAX_ADAPTER_BYTES = 4 * 10**9
MAX_RUN_SECONDS = 2 * 60 * 60
MAX_GPU_GIB = 8.0
MAX_MEMORY_GIB = 32.0
# Largest relative difference between the grader's call and `hw3 eval`, by dtype. Both compute the same sums. Other
# batches, dequantized weights and a separate adapter change the order of rounding, and so the last digits.
MAX_RELATIVE_SCORE_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.01, "float16": 0.01}
_MAX_IDS_SHOWN = 5

logger = logging.getLogger(__name__)


def verify_score(folder: Path, scored: ScoredCheckpoint, tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute the score with the grader's call in the folder, and compare it with that of `hw3 eval`.

    Args:
        folder: the submission folder.
        scored: the submitted checkpoint with its scores.
        tokenizer: the run's tokenizer.

    Returns:
        A line that reports both scores.

    Raises:
        RunError: the call failed, or the scores differ by more than rounding.
    """
    dtype = scored.recipe.model.dtype
    command = [sys.executable, "-m", "hw3.submission.grader"]
    command += ["--base_model_path", _base_model_argument(scored), "--peft_path", ADAPTER_DIR]
    command += ["--test_data_path", str(scored.data_file.resolve()), "--dtype", dtype]
    stdout = _run_in_folder(command, folder, scored, import_path=Path(hw3.__file__).parent.parent)
    measured, expected = float(stdout.split("Mean perplexity:")[1]), scored.entry.mean_perplexity
    difference, allowed = abs(measured / expected - 1), MAX_RELATIVE_SCORE_DIFFERENCE[dtype]
    line = (
        f"score: {expected:.4f} by hw3 eval, {measured:.4f} by the grader's call on {scored.data_file}; relative "
        f"difference {difference:.1e}, at most {allowed:g} in {dtype}"
    )
    if difference > allowed:
        raise RunError(f"{line}{_explain_score_difference(scored, tokenizer)}")
    # The course's own program always computes in bfloat16.
    return line if dtype == "bfloat16" else f"{line} (the course's ppl.py computes in bfloat16)"


def _explain_score_difference(scored: ScoredCheckpoint, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a line about the rows that the grader encodes differently from training; empty if there are none."""
    prompt = scored.recipe.prompt
    encoder = Encoder(tokenizer, prompt)
    before, after = encoder.turn_prefix_and_suffix()
    differing = []
    for row in read_rows(scored.data_file):
        turn = prompt.turn.replace(PLACEHOLDER, row.instruction)
        encoded = encoder.encode(row)
        by_grader = encode_as_grader(tokenizer, row, before + (turn.strip() if prompt.chat_template else turn) + after)
        if (by_grader.prompt_ids, by_grader.output_ids) != (encoded.prompt_ids, encoded.output_ids):
            differing.append(row.id)
    if not differing:
        return ""
    return (
        f"\n{len(differing)} rows contain the text of a special token, which the grader reads as the token itself: "
        + ", ".join(differing[:_MAX_IDS_SHOWN])
    )


def verify_predictions(
    folder: Path, scored: ScoredCheckpoint, rows: list[Row], reference: ReferenceOutputs, *, keep_file: bool
) -> list[str]:
    """Run `run.sh` in the folder, and compare its outputs with those of `hw3 predict`.

    Args:
        folder: the submission folder.
        scored: the submitted checkpoint.
        rows: the rows to predict.
        reference: the outputs of `hw3 predict` for these rows.
        keep_file: whether the outputs become the folder's `prediction.json`.

    Returns:
        Lines that report the comparison, and time and memory beside the course's limits.

    Raises:
        RunError: `run.sh` failed, exceeded a limit, or gave other outputs.
    """
    source, target = folder.parent / "input.json", (folder if keep_file else folder.parent) / PREDICTION_FILE
    write_json(source, [{"id": row.id, "instruction": row.instruction} for row in rows])
    command = [
        "bash",
        "run.sh",
        _base_model_argument(scored),
        ADAPTER_DIR,
        str(source.resolve()),
        str(target.resolve()),
    ]
    stdout = _run_in_folder(command, folder, scored)
    predictions = json.loads(target.read_text(encoding="utf-8"))
    if [prediction["id"] for prediction in predictions] != [row.id for row in rows]:
        raise RunError("run.sh: the ids of its outputs are not those of its input")
    line = compare_outputs(scored, rows, reference, [prediction["output"] for prediction in predictions])
    match = re.search(r"in ([\d.]+) s; peak ([\d.]+) GiB of memory, ([\d.]+) GiB of GPU memory", stdout)
    assert match is not None, stdout
    seconds, memory_gib, gpu_gib = map(float, match.groups())
    usage = (
        ("s", seconds, MAX_RUN_SECONDS),
        ("GiB of memory", memory_gib, MAX_MEMORY_GIB),
        ("GiB of GPU memory", gpu_gib, MAX_GPU_GIB),
    )
    for unit, value, limit in usage:
        if value > limit:
            raise RunError(f"run.sh: {value:g} {unit}; the course allows {limit:g}")
    figures = ", ".join(f"{value:g} {unit} (limit {limit:g})" for unit, value, limit in usage)
    return [line, f"run.sh: {len(rows)} rows on this machine: {figures}"]


def verify_files(folder: Path) -> str:
    """Return a line that reports the number of files and their size.

    Raises:
        RunError: the folder holds a file that does not belong to a submission.
    """
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if extra := files.keys() - SUBMISSION_FILES:
        raise RunError(f"{', '.join(sorted(extra))}: written while verifying, not part of a submission")
    size = format_bytes(sum(files.values()))
    return f"size: {len(files)} files, {size}; the course allows {format_bytes(MAX_ADAPTER_BYTES)} for the adapter"


def _base_model_argument(scored: ScoredCheckpoint) -> str:
    """Return the base model's name or absolute path, valid in any working directory."""
    name = scored.recipe.model.pretrained_model_name_or_path
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _run_in_folder(
    command: list[str], folder: Path, scored: ScoredCheckpoint, *, import_path: Path | None = None
) -> str:
    """Run a command in a new process whose working directory is the folder, and return its standard output.

    Args:
        command: the program and its arguments.
        folder: the submission folder.
        scored: the submitted checkpoint. If its run uses the CPU, GPUs are hidden.
        import_path: a directory from which the process may import, besides the folder and the user's `PYTHONPATH`.

    Raises:
        RunError: the command failed, or took longer than the course allows.
    """
    environment = dict(os.environ)
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
    if import_paths := _list_import_paths(import_path):
        environment["PYTHONPATH"] = os.pathsep.join(import_paths)
    if select_device(scored.recipe).type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    name = " ".join(command[:3])
    try:
        process = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=None if sys.stderr.isatty() else subprocess.PIPE,  # a terminal shows the progress
            encoding="utf-8",
            timeout=MAX_RUN_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"{name}: took longer than the course's {MAX_RUN_SECONDS // 3600} hours") from None
    if process.returncode:
        output = (process.stderr or "").strip()
        logger.debug(output)
        cause = output.rpartition("\n")[2]
        raise RunError(f"{name}: exit status {process.returncode}: {cause} (--verbose prints all of its messages)")
    return process.stdout


def _list_import_paths(import_path: Path | None) -> list[str]:
    """Return `import_path` and the entries of `PYTHONPATH` as absolute paths, valid in another working directory."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [os.path.abspath(entry) for entry in ([] if import_path is None else [str(import_path)]) + entries]
