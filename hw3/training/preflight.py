"""`hw3 check`: what a run would do, before it does it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.tokenization import IGNORE_INDEX, EncodedRow, Encoder, count_unknown, lengths_of
from hw3.modeling.devices import device_of
from hw3.modeling.loading import load_config, load_tokenizer, parameter_counts
from hw3.training.batch_layout import StepLayout, step_layout
from hw3.training.memory_estimate import GIB, PARTS
from hw3.training.plan import NoBase, plan_run, read_data
from hw3.training.step_strategy import choose_speed
from hw3.training.time_estimate import time_of_run

GREY, GREEN, BLUE, PLAIN = "\033[90m", "\033[32m", "\033[34m", "\033[0m"


def check(
    recipe: Recipe,
    run: Path,
    *,
    mask_rows: int = 0,
    processes: int = 1,
    sharded: str | None = None,
    probed: bool = True,
) -> int:
    """Print the resolved recipe, the length table, masked rows, steps, disk and, where there is a GPU, time.

    Args:
        recipe: the checked recipe.
        run: the run folder that `train` would write or go on in.
        mask_rows: rows to show as the collator hands them to the model.
        processes: processes that will share a step's rows.
        sharded: what will shard the model among them, from `hw3.training.sharding.sharded_as`.
        probed: whether to tell the time, which some steps are made for.

    Returns:
        0.

    Raises:
        UserError: data, model, machine or run folder do not fit; what could be shown has been.
    """
    print(recipe.to_yaml())
    try:
        plan = plan_run(recipe, run, processes, sharded)
    except NoBase:
        _show_files(recipe)
        raise
    except UserError as error:
        _show_rows(recipe, mask_rows, processes, sharded, error)
        raise
    _show_rows(recipe, mask_rows, processes, sharded)
    print("\n".join(plan.notes))
    first = 0
    if plan.resume is not None:
        first = plan.resume.step
        print(f"{run}: {'complete' if plan.done else 'would go on'} at step {first}")
    if probed and not plan.done and device_of(recipe).type == "cuda":
        print(time_of_run(recipe, plan.speed, plan.tokenizer, plan.rows, plan.steps - first))
    return 0


def _show_files(recipe: Recipe) -> None:
    """What is known of the data without a tokenizer, unless it is wrong, which has been said already."""
    with contextlib.suppress(UserError):
        data = read_data(recipe)
        files = ", ".join(f"{len(rows)} rows of {getattr(recipe.data, key)}" for key, rows in data.items())
        print(f"no mistake in {files}; tokens, lengths, memory and time cannot be told without the base")


def _show_rows(
    recipe: Recipe, mask_rows: int, processes: int, sharded: str | None, known: UserError | None = None
) -> None:
    """Lengths, speeds and masks, as far as data and model can be read; `known` has said already what cannot."""
    try:
        data, tokenizer, config = read_data(recipe), load_tokenizer(recipe.model), load_config(recipe.model)
        layout, (trained, _) = step_layout(recipe, processes), parameter_counts(recipe, config)
    except UserError:
        if known is None:
            raise
        return
    encoder = Encoder(tokenizer, recipe.prompt)
    encoded = {key: [encoder.encode(row) for row in rows] for key, rows in data.items()}
    _print_lengths(recipe, encoded, tokenizer.unk_token_id)
    lengths = lengths_of([row for row in encoded["train"] if len(row) <= recipe.data.max_length])
    if lengths and not recipe.training.get("use_cpu"):
        _print_speeds(recipe, layout, config, trained, lengths, sharded)
    if mask_rows:
        print(masked_rows(tokenizer, encoded["train"][:mask_rows], colour=sys.stdout.isatty()))


def _print_speeds(
    recipe: Recipe,
    layout: StepLayout,
    config: Any,
    trained: int,
    lengths: list[tuple[int, int]],
    sharded: str | None,
) -> None:
    """Memory of a step under each `speed`, by part, and what each chooses: on this GPU, or one that is large enough."""
    memory = torch.cuda.mem_get_info() if torch.cuda.is_available() else None
    print(f"{'GiB a GPU':<12}{'in all':>8}" + "".join(f"{name:>13}" for name in PARTS))
    notes = []
    for speed in ("auto", "plain", "lean"):
        chosen = choose_speed(
            dataclasses.replace(recipe, speed=speed),
            layout,
            config,
            trained,
            lengths,
            torch.device("cuda"),
            memory,
            sharded=sharded,
        )
        parts = "".join(f"{getattr(chosen.memory, name) / GIB:>13.1f}" for name in PARTS)
        print(f"{speed:<12}{chosen.memory.total / GIB:>8.1f}{parts}")
        notes += chosen.notes
    where = "on a GPU with memory enough (there is none here)"
    if memory is not None:
        where = f"{memory[0] / GIB:.1f} of {memory[1] / GIB:.1f} GiB are free"
    print("\n".join([where, *notes]) + "\n")


def masked_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow], *, colour: bool) -> str:
    """Rows seen through the real collator: every token with its id, as prompt (masked), label or padding.

    Args:
        tokenizer: turns ids into the text shown.
        rows: one batch of rows.
        colour: ANSI colours (grey, green, blue) beside the marks `-`, `+` and `.`.
    """
    batch = CompletionOnlyCollator(tokenizer.pad_token_id, tokenizer.eos_token_id)(
        [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    )
    lines = ["tokens as trained on: - masked prompt, + label, . padding"]
    for index, row in enumerate(rows):
        cells = []
        for token, label, real in zip(
            batch["input_ids"][index].tolist(),
            batch["labels"][index].tolist(),
            batch["attention_mask"][index].tolist(),
            strict=True,
        ):
            mark, tint = (".", BLUE) if not real else ("-", GREY) if label == IGNORE_INDEX else ("+", GREEN)
            text = tokenizer.convert_ids_to_tokens(token).replace("\n", "\\n")
            cell = f"{mark}{text}/{token}"
            cells.append(f"{tint}{cell}{PLAIN}" if colour else cell)
        lines += [f"row {row.id}", " ".join(cells)]
    return "\n".join(lines) + "\n"


def _print_lengths(recipe: Recipe, encoded: dict[str, list[EncodedRow]], unknown_id: int | None) -> None:
    print(f"{'tokens':<28}{'rows':>7}{'median':>8}{'95 %':>7}{'most':>7}{'unknown in outputs':>21}")
    for key, rows in encoded.items():
        parts = {
            "prompt": [len(row.prompt_ids) for row in rows],
            "output": [len(row.output_ids) for row in rows],
            "row": [len(row) for row in rows],
        }
        for part, lengths in parts.items():
            ordered = sorted(lengths)
            p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
            unknown = f"{count_unknown(rows, unknown_id):>21}" if part == "output" else ""
            name = f"{getattr(recipe.data, key)} {part}"
            print(f"{name:<28}{len(rows):>7}{ordered[len(ordered) // 2]:>8}{p95:>7}{ordered[-1]:>7}{unknown}")
    print()
