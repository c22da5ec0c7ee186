"""Plan a run: check recipe, machine, data, base model and run folder before anything is written."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks
from trl import SFTConfig

from hw3.common.disk import check_disk, check_writable
from hw3.common.distributed import world_size
from hw3.common.errors import UserError
from hw3.config.recipe import Recipe
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import EncodedRow, Encoder, apply_max_length, count_unknown, lengths_of
from hw3.modeling.devices import device_of, device_problems
from hw3.modeling.fingerprint import base_sha256, tokenizer_sha256
from hw3.modeling.loading import load_config, load_tokenizer, parameter_counts
from hw3.modeling.quantization import quantized_already
from hw3.runs.checkpoints import Checkpoint, complete_checkpoints
from hw3.runs.resume import check_resume, check_state, check_unchanged
from hw3.runs.run_dir import data_facts
from hw3.training.batch_layout import StepLayout, step_layout
from hw3.training.sft_arguments import TIMEOUT, disk_needed, sft_config, total_steps
from hw3.training.sharding import sharding_problems
from hw3.training.step_strategy import Speed, choose_speed

COURSE_DATA = Path("data/homework")
MISSING_DATA = (
    "put the course's train.json and public_test.json into data/homework/",
    "build a set like it from a public corpus: make data CORPUS=... (README, Data)",
    "use the sample in this repository: make train MODEL={model} TRAIN=data/train.json EVAL=data/eval.json",
)


def read_data(recipe: Recipe) -> dict[str, list[Row]]:
    """The recipe's files, all read and checked, by their key in the `data` section.

    Raises:
        UserError: files are missing (the course's with three ways on) or hold bad rows, all of them named.
    """
    files = {key: Path(name) for key in ("train", "eval", "dev") if (name := getattr(recipe.data, key)) is not None}
    missing = [path for path in files.values() if not path.exists()]
    if missing and not any(path.parent == COURSE_DATA for path in missing):
        raise UserError(*(f"data.{key}: {path}: no such file" for key, path in files.items() if path in missing))
    if missing:
        model = recipe.name.partition("-")[0]
        ways = [f"  {number}. {way.format(model=model)}" for number, way in enumerate(MISSING_DATA, 1)]
        raise UserError(f"no such file: {', '.join(map(str, missing))}. Three ways on:", *ways)
    rows, problems = {}, []
    for key, path in files.items():
        try:
            rows[key] = read_rows(path)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return rows


def encode_training_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> tuple[list[EncodedRow], list[str]]:
    """Training rows as ids under the recipe's length policy, and lines that say what was done.

    Raises:
        UserError: rows are too long, or too few for one step.
    """
    encoder = Encoder(tokenizer, recipe.prompt)
    encoded, lengths = apply_max_length(
        [encoder.encode(row) for row in rows],
        recipe.data.max_length,
        recipe.data.too_long,
        source=recipe.data.train,
        has_bos=encoder.bos_id is not None,
    )
    if len(encoded) < recipe.rows_per_step:
        raise UserError(
            f"{recipe.data.train}: {len(encoded)} rows do not fill one step of {recipe.rows_per_step} rows; lower "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    tokens = sorted(len(row) for row in encoded)
    notes = [
        f"{len(encoded)} rows of {recipe.data.train}: {tokens[len(tokens) // 2]} tokens in the middle, "
        f"{tokens[-1]} at most"
    ]
    if recipe.prompt.turn.endswith(" "):
        notes.append("the prompt ends with a space; most vocabularies write a word's space before the word")
    if lengths.dropped:
        notes.append(f"{len(lengths.dropped)} rows over data.max_length={recipe.data.max_length} left out")
    if lengths.truncated:
        notes.append(
            f"{len(lengths.truncated)} prompts cut at their beginning to data.max_length={recipe.data.max_length}"
        )
    if unknown := count_unknown(encoded, tokenizer.unk_token_id):
        notes.append(f"{unknown} output tokens are unknown to the tokenizer")
    return encoded, notes


@dataclass(frozen=True)
class Plan:
    """A run that has been checked, nothing written yet.

    Attributes:
        layout: how the recipe shares out a step's rows.
        speed: how a step will be made.
        config: arguments of the Trainer.
        tokenizer: the base's.
        rows: encoded training rows.
        files: what the manifest says of each data file.
        steps: optimizer steps of the whole run.
        resume: the checkpoint to go on from.
        content: hashes of training rows, base and tokenizer.
        trained: parameters that are trained.
        total: parameters of the base.
        notes: lines for the user.
    """

    layout: StepLayout
    speed: Speed
    config: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    rows: list[EncodedRow]
    files: dict[str, dict[str, Any]]
    steps: int
    resume: Checkpoint | None
    content: dict[str, str]
    trained: int
    total: int
    notes: list[str]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.resume is not None and self.resume.step >= self.steps


class NoBase(UserError):
    """Problems, the base among them: its configuration or tokenizer cannot be had."""


def plan_run(recipe: Recipe, run: Path, processes: int, sharded: str | None = None) -> Plan:
    """Check recipe, machine, data, model and run folder together; load no weights, write nothing.

    Args:
        recipe: the checked recipe.
        run: the run folder, which may not be there yet.
        processes: of the run.
        sharded: what the launcher shards the model with, from `hw3.speed.sharded_by`.

    Raises:
        UserError: every problem that could be found; `NoBase` where those are all that can be without the base.
    """
    problems = device_problems(recipe, processes) + sharding_problems(recipe, sharded)

    def tried(check: Callable[..., Any], *arguments: Any) -> Any:
        """What a check gives; None where it found problems, which are kept."""
        try:
            return check(*arguments)
        except UserError as error:
            problems.extend(error.problems)

    layout = tried(step_layout, recipe, processes)
    tried(check_writable, run)
    tried(_check_trackers, recipe)
    data = tried(read_data, recipe)
    base_config = tried(load_config, recipe.model)
    # Without the one there is hardly the other, and one message says how to get both.
    tokenizer = None if base_config is None else tried(load_tokenizer, recipe.model)
    counts = None if base_config is None else tried(parameter_counts, recipe, base_config)
    if base_config is not None:
        problems += quantized_already(recipe, base_config)
    encoded = None
    if data is not None and tokenizer is not None:
        encoded = tried(encode_training_rows, recipe, tokenizer, data["train"])
    if tokenizer is None:
        raise NoBase(*problems)
    if problems:
        raise UserError(*problems)
    (rows, notes), (trained, total) = encoded, counts
    files = {key: data_facts(Path(getattr(recipe.data, key)), rows) for key, rows in data.items()}
    content = {
        "train": files["train"]["sha256"],
        "base": base_sha256(recipe.model, base_config),
        "tokenizer": tokenizer_sha256(tokenizer),
    }
    checkpoints = complete_checkpoints(run)
    resumable = [checkpoint for checkpoint in checkpoints if checkpoint.resumable]
    if checkpoints:
        check_resume(run, recipe)
        check_unchanged(run, content)
        if not resumable:
            raise UserError(f"{run}: no checkpoint has the optimizer's state any more; start anew: RUN={run}-2")
    device = device_of(recipe)
    memory = least_memory(recipe, device) if device.type == "cuda" else None
    speed = choose_speed(recipe, layout, base_config, trained, lengths_of(rows), device, memory, sharded=sharded)
    notes += speed.notes
    try:
        config = sft_config(recipe, speed, run)
    except (ValueError, ImportError) as error:
        raise UserError(f"training: {error}") from error
    steps = total_steps(config, len(rows), recipe.rows_per_step)
    resume = resumable[-1] if resumable else None
    if resume is not None and resume.step < steps:
        check_state(resume, sharded, processes)
    notes.append(f"{trained:,} parameters are trained; the base has {total:,}")
    per_epoch = len(rows) // recipe.rows_per_step
    who = "one process" if processes == 1 else f"each of {processes} processes"
    notes.append(
        f"{steps} steps of {recipe.rows_per_step} rows, {steps / per_epoch:.2g} times through the file; {who} takes "
        f"{speed.layout.rows_per_device} rows x {speed.layout.accumulation}"
    )
    to_go = max(0, steps - (resume.step if resume else 0))
    notes.append(
        check_disk(run, disk_needed(config, recipe.training.get("save_total_limit"), trained, to_go, per_epoch))
    )
    return Plan(layout, speed, config, tokenizer, rows, files, steps, resume, content, trained, total, notes)


def least_memory(recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """Bytes of the GPU, free and in all; the least of all processes', since all must choose alike."""
    found = torch.cuda.mem_get_info(device)
    if world_size() == 1:
        return found
    # Joins the processes, as the Trainer would.
    PartialState(timeout=datetime.timedelta(seconds=recipe.training.get("ddp_timeout", TIMEOUT)))
    least = torch.tensor(found, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least[0]), int(least[1])


def _check_trackers(recipe: Recipe) -> None:
    """Refuse a `report_to` that does not exist or is not installed.

    Raises:
        UserError: names it.
    """
    names = recipe.training.get("report_to", "tensorboard")
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"training.report_to: {names}: {error}") from error
