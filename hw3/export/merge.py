"""`hw3 export`: merge a checkpoint's adapter into its dequantized base model, and write a complete model."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hw3.common.atomic_io import apply_umask, write_atomically
from hw3.common.disk import check_folder_is_new, format_bytes
from hw3.common.errors import RunError, UserError
from hw3.common.progress import ProgressLine
from hw3.config.recipe import Recipe
from hw3.config.schema import ModelSection
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.batch_size import auto_tokens_per_batch
from hw3.evaluation.perplexity import score_rows, summarize
from hw3.evaluation.selection import ScoredCheckpoint, select_scored_checkpoint
from hw3.export.chat_template import build_chat_template
from hw3.export.model_card import build_model_card
from hw3.generation.batch_generate import build_generation_config, get_stop_token_ids
from hw3.modeling.adapter_io import InvalidAdapterError
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.devices import select_device
from hw3.modeling.loading import (
    count_base_parameters,
    load_base_model,
    load_model,
    load_model_config,
    load_tokenizer,
    resolve_attn_implementation,
)
from hw3.modeling.logits import verify_output_head
from hw3.modeling.quantization import dequantize, fits_on_device
from hw3.runs.open_run import load_checkpoint
from hw3.runs.run import Run

# The checkpoint was scored with base model and adapter side by side. Merging rounds their sum to the compute dtype.
MAX_RELATIVE_PERPLEXITY_CHANGE = 0.01  # a larger change prints a warning

logger = logging.getLogger(__name__)


def export_run(run: Run, *, checkpoint: str = "best", output: Path | None = None) -> int:
    """Write a checkpoint as a complete model with tokenizer and model card, load the written files, and score them.

    Args:
        run: the run, scored on its `data.eval`.
        checkpoint: a checkpoint's name or step, or `best`.
        output: the folder to create; `RUN-export` if None.

    Returns:
        0.

    Raises:
        UserError: the run, a file or an argument does not fit.
        RunError: the checkpoint's weights cannot be read.
    """
    scored = select_scored_checkpoint(run, checkpoint)
    recipe = scored.recipe
    output = output or run.path.with_name(f"{run.path.name}-export")
    check_folder_is_new(output, "OUTPUT= (--output)")
    if (recipe.lora or {}).get("layer_replication"):
        raise UserError(f"{run}: lora.layer_replication: replicated layers share their weights and cannot be merged")
    tokenizer = run.load_tokenizer(recipe)
    if not recipe.prompt.chat_template:
        tokenizer.chat_template = build_chat_template(recipe.prompt, tokenizer)
    model_bytes = count_base_parameters(load_model_config(recipe.model)) * getattr(torch, recipe.model.dtype).itemsize
    device = _select_merge_device(recipe, model_bytes)
    output.parent.mkdir(parents=True, exist_ok=True)
    if model_bytes > (free := shutil.disk_usage(output.parent).free):
        raise UserError(
            f"{output}: the model takes {format_bytes(model_bytes)}, but {format_bytes(free)} are free; free some "
            "space, or set OUTPUT= (--output) to a folder on another disk"
        )
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "export"
        _write_merged_model(folder, scored, tokenizer, device)
        gc.collect()
        torch.cuda.empty_cache()
        merged_perplexity = _score_folder(folder, scored, device)
        write_atomically(folder / "README.md", build_model_card(scored, output.name, merged_perplexity))
        size = sum(file.stat().st_size for file in folder.iterdir())
        os.rename(folder, output)
    print(f"{output}: {scored.checkpoint.name} of {run}, {format_bytes(size)}")
    _print_perplexities(scored, merged_perplexity)
    return 0


def _select_merge_device(recipe: Recipe, model_bytes: int) -> torch.device:
    """Return the run's device, or the CPU if the complete model does not fit on the GPU."""
    device = select_device(recipe)
    if fits_on_device(device, model_bytes):
        return device
    logger.info(
        f"the model takes {format_bytes(model_bytes)}, too much for this GPU; it is merged and scored on the CPU"
    )
    return torch.device("cpu")


def _write_merged_model(
    folder: Path, scored: ScoredCheckpoint, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> None:
    recipe = scored.recipe
    model = load_base_model(recipe, device).eval()
    stop_token_ids = get_stop_token_ids(model, tokenizer.eos_token_id)
    if recipe.quantization is not None:
        model = dequantize(model)
    slot = AdapterSlot(model)
    try:
        load_checkpoint(slot, model, scored.checkpoint)
    except InvalidAdapterError as error:
        raise RunError(str(error)) from error
    if recipe.lora is not None:
        model = slot.merge()
    model.config.use_cache = True  # off in training and scoring
    model.generation_config = build_generation_config(recipe.generation, stop_token_ids)
    model.config.eos_token_id = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    apply_umask(folder)


def _score_folder(folder: Path, scored: ScoredCheckpoint, device: torch.device) -> float:
    """Return the mean perplexity of the written model, loaded with plain transformers."""
    recipe = scored.recipe
    section = ModelSection(
        pretrained_model_name_or_path=str(folder),
        dtype=recipe.model.dtype,
        attn_implementation=resolve_attn_implementation(recipe.model),
    )
    encoder = Encoder(load_tokenizer(section), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(scored.data_file)]
    model = load_model(section, None, device).eval()
    verify_output_head(model, min(rows, key=len))
    tokens_per_batch = recipe.evaluation.tokens_per_batch or auto_tokens_per_batch(model, max(map(len, rows)))
    with ProgressLine("scoring", len(rows), "rows", is_logged=True) as progress:
        scores = score_rows(model, rows, tokens_per_batch=tokens_per_batch, on_batch=progress.advance)
    return summarize(scores).mean_perplexity


def _print_perplexities(scored: ScoredCheckpoint, merged_perplexity: float) -> None:
    """Print the scores before and after merging, with a warning if they differ too much."""
    change = merged_perplexity / scored.entry.mean_perplexity - 1
    print(
        f"  mean perplexity on {scored.data_file}: {scored.entry.mean_perplexity:.4f} before merging, "
        f"{merged_perplexity:.4f} after merging, relative change {change:+.1e}"
    )
    if abs(change) > MAX_RELATIVE_PERPLEXITY_CHANGE:
        print(
            f"  warning: the change exceeds {MAX_RELATIVE_PERPLEXITY_CHANGE:.0%}: rounding the merged weights to "
            f"{scored.recipe.model.dtype} changes this model; use the adapter with its quantized base model instead"
        )
