"""`hw3 check`: report what a run would do, without running it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hw3.common.console import print_unescaped
from hw3.common.disk import format_bytes
from hw3.common.errors import UserError
from hw3.common.statistics import percentile
from hw3.common.text import escape_invisible
from hw3.config.data_files import describe_rows, read_data_files
from hw3.config.recipe import Recipe
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.rows import DataFileKey
from hw3.data.tokenization import (
    IGNORE_INDEX,
    EncodedRow,
    Encoder,
    count_tokens,
    count_unknown,
    find_changed_rows,
)
from hw3.modeling.devices import find_missing_gpu, select_device
from hw3.modeling.loading import count_parameters, load_model_config, load_tokenizer
from hw3.training.batch_layout import divide_batch
from hw3.training.datasheet_estimate import T4, describe_run_on
from hw3.training.memory_estimate import MEMORY_PARTS
from hw3.training.plan import BaseModelUnavailableError, plan_run, resolve_run_dtype
from hw3.training.sharding import Sharding
from hw3.training.step_strategy import Workload, choose_step_strategy
from hw3.training.time_estimate import estimate_run_time

logger = logging.getLogger(__name__)

# ANSI escape codes.
GRAY, GREEN, BLUE, RESET = "\033[90m", "\033[32m", "\033[34m", "\033[0m"


def check_recipe(
    recipe: Recipe,
    run_dir: Path,
    *,
    show_masks: int = 0,
    processes: int = 1,
    sharding: Sharding | None = None,
    estimate_time: bool = True,
) -> int:
    """Print the resolved recipe, token counts, masked rows, memory, steps, disk space and, on a GPU, the time.

    Args:
        recipe: the checked recipe.
        run_dir: the run folder that `hw3 train` would write, or resume.
        show_masks: number of rows to show as the collator passes them to the model.
        processes: number of processes of the run.
        sharding: what will shard the model among them, from `sharding_from_file`.
        estimate_time: whether to estimate the time, which takes some training steps.

    Returns:
        0.

    Raises:
        UserError: data, model, machine or run folder are wrong; everything that can be shown has been printed. A
            missing GPU is only a notice, because a run can be checked on another machine.
    """
    recipe = resolve_run_dtype(recipe, run_dir)
    print(recipe.to_yaml())
    try:
        plan = plan_run(recipe, run_dir, processes, sharding)
    except BaseModelUnavailableError:
        _show_files(recipe)
        raise
    except UserError as error:
        with contextlib.suppress(UserError):  # the same problems
            _show_rows(recipe, show_masks, processes, sharding)
        if error.problems != [find_missing_gpu(recipe)]:
            raise
        logger.warning(f"nothing else is wrong, but {error}")
        return 0
    _show_rows(recipe, show_masks, processes, sharding)
    print("\n".join(plan.notes))
    if plan.resume_from is not None:
        print(f"{run_dir}: {'complete' if plan.is_complete else 'would resume'} at step {plan.first_step}")
    if estimate_time and not plan.is_complete and select_device(recipe).type == "cuda":
        steps = plan.steps - plan.first_step
        print(estimate_run_time(recipe, plan.strategy, plan.tokenizer, plan.rows, steps))
    return 0


def _show_files(recipe: Recipe) -> None:
    """Print what is known of valid data files without a tokenizer."""
    with contextlib.suppress(UserError):  # problems of the files have been reported
        rows_by_file = read_data_files(recipe.document, recipe.data, recipe.seed)
        files = ", ".join(
            f"{len(rows)} rows of {describe_rows(recipe.data, key)}" for key, rows in rows_by_file.items()
        )
        print(f"no mistake in {files}; tokens, lengths, memory and time are not known without the base model")


def _show_rows(recipe: Recipe, show_masks: int, processes: int, sharding: Sharding | None) -> None:
    """Print token counts, memory under each `speed`, and masked rows.

    Raises:
        UserError: data files, tokenizer or the base model's configuration cannot be read.
    """
    rows_by_file = read_data_files(recipe.document, recipe.data, recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    config = load_model_config(recipe.model)
    layout, (trained_parameters, _) = divide_batch(recipe, processes), count_parameters(recipe, config)
    encoder = Encoder(tokenizer, recipe.prompt)
    encoded = {key: [encoder.encode(row) for row in rows] for key, rows in rows_by_file.items()}
    _print_token_counts(recipe, encoded, tokenizer.unk_token_id)
    for key, rows in rows_by_file.items():
        if changed := find_changed_rows(rows, encoder):
            count, file = f"{len(changed)} of {len(rows)} rows", describe_rows(recipe.data, key)
            print(
                f"warning: the tokenizer changes the text of {count} of {file}, such as letters' case or full-width "
                f"characters; the first is {changed[0]}\n"
            )
    lengths = count_tokens([row for row in encoded["train"] if len(row) <= recipe.data.max_length])
    if lengths and not recipe.training.get("use_cpu"):
        _print_memory(Workload(recipe, layout, config, trained_parameters, lengths, sharding))
    if show_masks:
        print_unescaped(render_masked_rows(tokenizer, encoded["train"][:show_masks], color=sys.stdout.isatty()))


def _print_token_counts(
    recipe: Recipe, rows_by_file: dict[DataFileKey, list[EncodedRow]], unknown_id: int | None
) -> None:
    """Print a table of token counts by file, for prompts, outputs and complete rows."""
    print(f"{'tokens':<28}{'rows':>7}{'median':>8}{'95 %':>7}{'most':>7}{'unknown in outputs':>21}")
    for key, rows in rows_by_file.items():
        counts_by_part = {
            "prompt": [len(row.prompt_ids) for row in rows],
            "output": [len(row.output_ids) for row in rows],
            "row": [len(row) for row in rows],
        }
        for part, counts in counts_by_part.items():
            unknown = f"{count_unknown(rows, unknown_id):>21}" if part == "output" else ""
            name = f"{describe_rows(recipe.data, key)} {part}"
            median, p95 = statistics.median(counts), percentile(counts, 95)
            print(f"{name:<28}{len(rows):>7}{median:>8g}{p95:>7.0f}{max(counts):>7}{unknown}")
    print()


def _print_memory(workload: Workload) -> None:
    """Print the memory of a step under each `speed`, by part, and what each chooses.

    Without a GPU, assume one that is large enough, and compute the time on a T4.
    """
    memory = torch.cuda.mem_get_info() if torch.cuda.is_available() else None
    print(f"{'memory per GPU':<16}{'total':>10}" + "".join(f"{name:>13}" for name in MEMORY_PARTS))
    notes = []
    for speed in ("auto", "plain", "lean"):
        recipe = dataclasses.replace(workload.recipe, speed=speed)
        strategy = choose_step_strategy(dataclasses.replace(workload, recipe=recipe), torch.device("cuda"), memory)
        parts = "".join(f"{format_bytes(getattr(strategy.memory, name)):>13}" for name in MEMORY_PARTS)
        print(f"{speed:<16}{format_bytes(strategy.memory.total):>10}{parts}")
        notes += strategy.notes
    gpu = "on a GPU with enough memory (there is none here)"
    if memory is None and workload.recipe.lora is not None and workload.sharding is None:
        notes.append(describe_run_on(T4, workload))
    if memory is not None:
        gpu = f"{format_bytes(memory[0])} of {format_bytes(memory[1])} are free"
    print("\n".join([gpu, *notes]) + "\n")


def render_masked_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow], *, color: bool) -> str:
    """Return rows as the collator passes them to the model: each token with its id, as prompt, label or padding.

    Args:
        tokenizer: the tokenizer of the ids.
        rows: the rows of one batch.
        color: whether to add ANSI colors (gray, green, blue) to the marks `-`, `+` and `.`.
    """
    batch = CompletionOnlyCollator(tokenizer.pad_token_id, tokenizer.eos_token_id)(
        [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    )
    lines = ["tokens in training: - masked prompt, + label, . padding"]
    for index, row in enumerate(rows):
        cells = []
        for token, label, is_token in zip(
            batch["input_ids"][index].tolist(),
            batch["labels"][index].tolist(),
            batch["attention_mask"][index].tolist(),
            strict=True,
        ):
            mark, tint = (".", BLUE) if not is_token else ("-", GRAY) if label == IGNORE_INDEX else ("+", GREEN)
            text = tokenizer.convert_ids_to_tokens(token)
            assert isinstance(text, str), "only a list of ids is converted to a list"
            cell = "{}{}/{}".format(mark, escape_invisible(text.replace("\n", "\\n")), token)
            cells.append(f"{tint}{cell}{RESET}" if color else cell)
        lines += [f"row {escape_invisible(row.id)}", " ".join(cells)]
    return "\n".join(lines) + "\n"
