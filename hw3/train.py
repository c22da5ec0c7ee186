"""`hw3 train`: a recipe becomes a run folder of complete checkpoints. Reads from top to bottom."""

from __future__ import annotations

import datetime
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hw3.encoding import EncodedRow, Encoder, apply_max_length, count_unknown
from hw3.errors import UserError
from hw3.model import (
    base_sha256,
    device_of,
    device_problems,
    load_base,
    load_config,
    load_tokenizer,
    local_rank,
    parameter_counts,
    world_size,
)
from hw3.recipe import Recipe, step_layout
from hw3.rows import Row, file_sha256, read_rows
from hw3.run_folder import (
    RECIPE,
    TOKENIZER,
    check_data_unchanged,
    check_disk,
    check_resume,
    complete_checkpoints,
    environment,
    portable,
    read_manifest,
    remove,
    torn_checkpoints,
    write_atomically,
    write_json,
)
from hw3.trainer import CompletionTrainer, disk_needed, sft_config

MISSING_DATA = (
    "put the course's train.json and public_test.json into data/homework/",
    "build a set like it from a public corpus: make data",
    "use the sample in this repository: make train MODEL={model} TRAIN=data/train.json EVAL=data/eval.json",
)


def read_data(recipe: Recipe) -> dict[str, list[Row]]:
    """The recipe's files, all read and checked, by their key in the `data` section.

    Raises:
        UserError: files are missing (with three ways on) or hold bad rows, all of them named.
    """
    files = {key: Path(name) for key in ("train", "eval", "dev") if (name := getattr(recipe.data, key)) is not None}
    missing = [path for path in files.values() if not path.exists()]
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
    if lengths.dropped:
        notes.append(f"{len(lengths.dropped)} rows over data.max_length={recipe.data.max_length} left out")
    if lengths.truncated:
        notes.append(
            f"{len(lengths.truncated)} prompts cut at their beginning to data.max_length={recipe.data.max_length}"
        )
    if unknown := count_unknown(encoded, tokenizer.unk_token_id):
        notes.append(f"{unknown} output tokens are unknown to the tokenizer")
    return encoded, notes


def use_first_gpu() -> str | None:
    """Without a launcher, show PyTorch one GPU only; returns a line on how to use the others.

    Must run before CUDA is initialized.
    """
    if world_size() > 1:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if visible is None else len(visible.split(","))
    if count < 2:
        return None
    first = "0" if visible is None else visible.split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = first
    others = f"make train GPUS={count}, or accelerate launch --num_processes {count} -m hw3 train ..."
    return f"using GPU {first} of {count}; all of them: {others}"


def train(recipe: Recipe, run: Path) -> int:
    """Fine-tune, or resume. Everything a user can get wrong is checked before anything is written.

    Args:
        recipe: the checked recipe.
        run: the run folder, made if absent.

    Returns:
        0, or 128 plus a signal's number when one stopped the run after a complete checkpoint.

    Raises:
        UserError: recipe, data, machine or run folder do not fit; nothing has been written.
        NonFiniteLoss: the loss became NaN or infinite.
    """
    main_process = local_rank() == 0 and int(os.environ.get("RANK", "0")) == 0

    def say(line: str) -> None:
        if main_process:
            print(line, flush=True)

    began = time.time()
    # --- check: recipe, machine, data, run folder -------------------------------------------------------------------
    if note := use_first_gpu():
        say(note)
    problems = device_problems(recipe)
    if problems:
        raise UserError(*problems)
    layout = step_layout(recipe, world_size())
    data = read_data(recipe)
    train_sha256 = file_sha256(Path(recipe.data.train))
    checkpoints = complete_checkpoints(run)
    resumable = [checkpoint for checkpoint in checkpoints if checkpoint.resumable]
    if checkpoints:
        check_resume(run, recipe)
        check_data_unchanged(run, train_sha256)
        if not resumable:
            raise UserError(f"{run}: no checkpoint has the optimizer's state any more; start anew: RUN={run}-2")
    tokenizer = load_tokenizer(recipe.model)
    rows, notes = encode_training_rows(recipe, tokenizer, data["train"])
    for note in notes:
        say(note)
    try:
        config = sft_config(recipe, layout, run)
    except ValueError as error:
        raise UserError(f"training: {error}") from error
    steps_per_epoch = len(rows) // recipe.rows_per_step
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    if resumable and resumable[-1].step >= steps:
        say(f"{run} is complete: step {resumable[-1].step} of {steps}. Next: make eval")
        return 0

    base_config = load_config(recipe.model)
    trainable, total = parameter_counts(recipe, base_config)
    say(f"{trainable:,} trained of {total:,} parameters, {recipe.rows_per_step} rows a step, {steps} steps")
    remaining = steps - (resumable[-1].step if resumable else 0)
    say(check_disk(run, disk_needed(config, trainable, remaining)))

    # --- build: base, adapters, trainer -----------------------------------------------------------------------------
    device = device_of(recipe)
    model = load_base(recipe, device)
    trainer = CompletionTrainer(recipe, config, layout, model, tokenizer, rows)

    # --- write: recipe, manifest, tokenizer -------------------------------------------------------------------------
    manifest = read_manifest(run) if resumable else {}
    if trainer.args.should_save:
        remove(torn_checkpoints(run))
        write_atomically(run / RECIPE, recipe.to_yaml())
        tokenizer.save_pretrained(run / TOKENIZER)
        manifest = {
            "schema": 1,
            "name": recipe.name,
            **environment(),
            "data": {
                key: {"path": portable(path), "sha256": file_sha256(path), "rows": len(data[key])}
                for key, path in ((key, Path(getattr(recipe.data, key))) for key in data)
            },
            "prompt_sha256": recipe.prompt.sha256,
            "quantization": None if recipe.quantization is None else recipe.quantization.model_dump(),
            "base": {
                "name": recipe.model.pretrained_model_name_or_path,
                "sha256": base_sha256(recipe.model, base_config),
            },
            "tokens": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "layout": asdict(layout),
            "parameters": {"trained": trainable, "total": total},
            "sessions": manifest.get("sessions", []),
        }
        write_json(run / "manifest.json", manifest)

    # --- train ------------------------------------------------------------------------------------------------------
    if resumable:
        say(f"resuming {run} from step {resumable[-1].step} of {steps}")
    trainer.stop.install()
    trainer.train(resume_from_checkpoint=str(resumable[-1].path) if resumable else None)

    # --- close ------------------------------------------------------------------------------------------------------
    if trainer.args.should_save:
        manifest["sessions"].append(
            _session(began, resumable[-1].step if resumable else 0, trainer.state.global_step, device, world_size())
        )
        write_json(run / "manifest.json", manifest)
    if trainer.stop.signal:
        say(f"stopped at step {trainer.state.global_step} of {steps}; the same command goes on from there")
        return 128 + trainer.stop.signal
    say(f"{run}: {steps} steps done. Next: make eval")
    return 0


def _session(began: float, first: int, last: int, device: torch.device, processes: int) -> dict[str, Any]:
    """One stretch of training, for the manifest."""
    session: dict[str, Any] = {
        "began": datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - began, 1),
        "from_step": first,
        "to_step": last,
        "processes": processes,
    }
    if device.type == "cuda":
        session["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return session
