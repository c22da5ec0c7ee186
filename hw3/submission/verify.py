"""What the homework's grader would do with a packed folder: fresh processes, its files alone, the course's limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

import hw3
from hw3.common.atomic_io import write_json
from hw3.common.disk import gib
from hw3.common.errors import RunFailed
from hw3.data.prompt import PLACEHOLDER
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.selection import Scored
from hw3.modeling.devices import device_of
from hw3.submission.grader_encoding import encode_as_grader
from hw3.submission.output_agreement import OwnAnswers, compare_answers

ADAPTER = "adapter_checkpoint"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREDICTION = "prediction.json"
# The course's limits.
ADAPTER_BYTES = 4 * 10**9
RUN_SECONDS = 2 * 60 * 60
GPU_GIB = 8.0
MEMORY_GIB = 32.0
# How far the grader's call may be from `hw3 eval`, relatively. Both compute the same sums; batches, a dequantized base
# and the adapter's share are rounded in another order, which shows in the last digits of the compute dtype.
SCORE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.01, "float16": 0.01}


def check_score(folder: Path, scored: Scored, tokenizer: PreTrainedTokenizerBase) -> str:
    """The grader's own call, in the folder."""
    dtype = scored.recipe.model.dtype
    shown = _fresh_process(
        [sys.executable, "-m", "hw3.submission.grader", "--base_model_path", _base(scored), "--peft_path", ADAPTER,
         "--test_data_path", str(scored.data.resolve()), "--dtype", dtype],
        folder, scored, imports=Path(hw3.__file__).parent.parent,
    )  # fmt: skip
    theirs, ours = float(shown.split("Mean perplexity:")[1]), scored.entry["mean_perplexity"]
    difference, allowed = abs(theirs / ours - 1), SCORE_TOLERANCE[dtype]
    line = (
        f"score: {ours:.4f} by hw3 eval, {theirs:.4f} by the grader's call on {scored.data}; relative difference "
        f"{difference:.1e}, at most {allowed:g} in {dtype}"
    )
    if difference > allowed:
        raise RunFailed(f"{line}; not packed{_read_otherwise(scored, tokenizer)}")
    # The course's own program knows one dtype.
    return line if dtype == "bfloat16" else f"{line} (the course's ppl.py computes in bfloat16)"


def _read_otherwise(scored: Scored, tokenizer: PreTrainedTokenizerBase) -> str:
    """Which rows the grader turns into other ids than training did, as an explanation."""
    encoder = Encoder(tokenizer, scored.recipe.prompt)
    before, after = encoder.text_around_turn()
    strip = str.strip if scored.recipe.prompt.chat_template else str
    differing = []
    for row in read_rows(scored.data):
        turn = strip(scored.recipe.prompt.turn.replace(PLACEHOLDER, row.instruction))
        encoded = encode_as_grader(tokenizer, row, before + turn + after)
        if (encoded.prompt_ids, encoded.output_ids) != (
            encoder.prompt_ids(row.instruction),
            encoder.output_ids(row.output),
        ):
            differing.append(row.id)
    if not differing:
        return ""
    return f"\n{len(differing)} rows spell a special token, which the grader takes for the token itself: " + ", ".join(
        differing[:5]
    )


def check_answers(folder: Path, scored: Scored, rows: list[Row], own: OwnAnswers, *, keep: bool) -> list[str]:
    """`run.sh` in the folder, against our own answers; its output becomes `prediction.json`."""
    source, target = folder.parent / "input.json", folder / PREDICTION if keep else folder.parent / PREDICTION
    write_json(source, [{"id": row.id, "instruction": row.instruction} for row in rows])
    said = _fresh_process(
        ["bash", "run.sh", _base(scored), ADAPTER, str(source.resolve()), str(target.resolve())], folder, scored
    )
    theirs = json.loads(target.read_text(encoding="utf-8"))
    if [answer["id"] for answer in theirs] != [row.id for row in rows]:
        raise RunFailed("run.sh: the ids of its answers are not those of its input; not packed")
    line = compare_answers(scored, rows, own, [answer["output"] for answer in theirs])
    found = re.search(r"in ([\d.]+) s; peak ([\d.]+) GiB of memory, ([\d.]+) GiB of GPU memory", said)
    assert found is not None, said
    seconds, memory, gpu = map(float, found.groups())
    limits = (("s", seconds, RUN_SECONDS), ("GiB of memory", memory, MEMORY_GIB), ("GiB of GPU memory", gpu, GPU_GIB))
    for unit, value, limit in limits:
        if value > limit:
            raise RunFailed(f"run.sh: {value:g} {unit}; the course allows {limit:g}; not packed")
    took = ", ".join(f"{value:g} {unit} of {limit:g}" for unit, value, limit in limits)
    return [line, f"run.sh: {len(rows)} rows, here: {took}"]


def check_size(folder: Path) -> str:
    """What the folder holds; nothing but what was meant to be there."""
    meant = {"README.md", "download.sh", "predict.py", "run.sh", "utils.py", f"{ADAPTER}/{ADAPTER_CONFIG}"}
    meant |= {f"{ADAPTER}/{ADAPTER_WEIGHTS}"}
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if extra := files.keys() - meant - {PREDICTION}:
        raise RunFailed(f"{', '.join(sorted(extra))}: written by the check, no part of the submission; not packed")
    size = sum(files.values())
    return f"size: {len(files)} files, {gib(size)}; the adapter may take {gib(ADAPTER_BYTES)}"


def _base(scored: Scored) -> str:
    """The base as a process in another folder finds it."""
    name = scored.recipe.model.pretrained_model_name_or_path
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _fresh_process(command: list[str], folder: Path, scored: Scored, *, imports: Path | None = None) -> str:
    """Run a command in the folder; returns what it printed.

    Args:
        command: the program and its arguments.
        folder: the packed folder, where it runs.
        scored: says whether the run is one of the CPU.
        imports: what besides the folder's own files may be imported.

    Raises:
        RunFailed: it failed, or took longer than the course allows.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
    if imports is not None:
        environment["PYTHONPATH"] = str(imports)
    if device_of(scored.recipe).type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    name = " ".join(command[:3])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=None if sys.stderr.isatty() else subprocess.PIPE,  # progress, for who watches
            encoding="utf-8",
            timeout=RUN_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{name}: took longer than the course's {RUN_SECONDS // 3600} hours; not packed") from None
    if done.returncode:
        raise RunFailed(f"{name}: ended with {done.returncode}; not packed\n{(done.stderr or '').strip()}")
    return done.stdout
