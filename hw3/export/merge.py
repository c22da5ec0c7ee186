"""`hw3 export`: merge a checkpoint's adapter into its dequantized base model, and write a complete model."""

from __future__ import annotations

import gc
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hw3.common.atomic_io import apply_umask, write_atomically
from hw3.common.disk import check_folder_is_new, format_bytes
from hw3.common.errors import RunError, UserError, first_line
from hw3.common.progress import ProgressLine
from hw3.config.recipe import Recipe
from hw3.config.schema import ModelSection
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.batch_size import auto_tokens_per_batch
from hw3.evaluation.perplexity import score_rows, summarize
from hw3.evaluation.selection import ScoredCheckpoint, select_scored_checkpoint
from hw3.export.chat_template import build_chat_template
from hw3.export.gguf import BYTES_PER_WEIGHT, GgufOptions, set_token_ids
from hw3.export.gguf_export import GgufExport
from hw3.export.model_card import build_model_card
from hw3.generation.batch_generate import build_generation_config, get_stop_token_ids
from hw3.modeling.adapter_io import InvalidAdapterError
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.devices import select_device
from hw3.modeling.float16_products import get_export_dtype
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
from hw3.runs.staging import staging_folder

# Largest relative change of the mean perplexity that rounding explains, by the coarsest dtype involved. The checkpoint
# was scored with base model and adapter side by side. Merging rounds their sum to the model's dtype.
MAX_RELATIVE_PERPLEXITY_CHANGE = {"float32": 0.001, "float16": 0.02, "bfloat16": 0.05}

logger = logging.getLogger(__name__)


def export_run(
    run: Run, *, checkpoint: str = "best", output: Path | None = None, gguf_options: GgufOptions | None = None
) -> int:
    """Write a checkpoint as a complete model with tokenizer and model card, load the written files, and score them.

    The folder is kept only if it scores as the checkpoint did, within `MAX_RELATIVE_PERPLEXITY_CHANGE`.

    Args:
        run: the run, scored on its `data.eval`.
        checkpoint: a checkpoint's name or step, or `best`.
        output: the folder to create; `RUN-export` if None.
        gguf_options: how to write a GGUF file into the folder as well; None for no such file.

    Returns:
        0.

    Raises:
        UserError: the run, a file or an argument does not fit, or llama.cpp does not know the model.
        RunError: the checkpoint's weights cannot be read or merged, or the merged model scores differently; or the GGUF
            file does, which is kept.
    """
    scored = select_scored_checkpoint(run, checkpoint)
    recipe = scored.recipe
    output = output or run.folder_beside("-export")
    check_folder_is_new(output, "OUTPUT= (--output)")
    if (recipe.lora or {}).get("layer_replication"):
        raise UserError(f"{run}: lora.layer_replication: replicated layers share their weights and cannot be merged")
    tokenizer = run.load_tokenizer(recipe)
    if not recipe.prompt.chat_template:
        tokenizer.chat_template = build_chat_template(recipe.prompt, tokenizer)
    gguf = None if gguf_options is None else GgufExport(gguf_options, scored, tokenizer)
    num_parameters = count_base_parameters(load_model_config(recipe.model))
    model_bytes = num_parameters * getattr(torch, recipe.model.dtype).itemsize
    gguf_bytes = 0 if gguf_options is None else round(num_parameters * BYTES_PER_WEIGHT[gguf_options.quantization])
    device = _select_merge_device(recipe, model_bytes)
    _check_free_space(output, model_bytes + gguf_bytes)
    with staging_folder(output) as staging:
        if gguf is not None:
            gguf.check_vocabulary(staging / "vocabulary")
        folder = staging / "export"
        _write_merged_model(folder, scored, tokenizer, device)
        gc.collect()
        torch.cuda.empty_cache()
        merged_perplexity = _score_folder(folder, scored, device)
        _check_perplexity(scored, merged_perplexity)
        write_atomically(folder / "README.md", build_model_card(scored, output.name, merged_perplexity))
        size = sum(file.stat().st_size for file in folder.iterdir())
        gguf_name = None if gguf is None else gguf.write(folder, output.name)
        os.rename(folder, output)
    print(f"{output}: {scored.checkpoint.name} of {run}, {format_bytes(size)}")
    print(f"  {_describe_perplexities(scored, merged_perplexity)}")
    return 0 if gguf is None or gguf_name is None else gguf.report(output / gguf_name)


def _check_free_space(output: Path, needed: int) -> None:
    """Check that the disk has room for the files of a folder to create.

    Args:
        output: the folder. Its parent folder is created.
        needed: size of the files in bytes.

    Raises:
        UserError: it has not.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(output.parent).free):
        raise UserError(
            f"{output}: the model takes {format_bytes(needed)}, but {format_bytes(free)} are free; free some "
            "space, or set OUTPUT= (--output) to a folder on another disk"
        )


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
        load_checkpoint(slot, scored.checkpoint)
    except InvalidAdapterError as error:
        raise RunError(str(error)) from error
    if recipe.lora is not None:
        try:
            model = _merge_adapter(slot, model)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = first_line(error)
            raise RunError(f"{scored.checkpoint.path}: the adapter cannot be merged: {reason}") from error
    _restore_conv1d_layers(model)
    if recipe.model.dtype == "float16":
        model = model.to(getattr(torch, get_export_dtype(recipe.model.dtype)))
    model.config.use_cache = True  # off in training and scoring
    model.generation_config = build_generation_config(recipe.generation, stop_token_ids)
    set_token_ids(model.config, tokenizer)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    apply_umask(folder)


def _merge_adapter(slot: AdapterSlot, model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with its adapter merged. Its configuration ties the embeddings if they are still equal.

    An adapter of tied embeddings may apply to one of the two only, input embeddings or output head.
    """
    embeddings, head = (_plain_layer(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    are_tied = head.weight is embeddings.weight
    if are_tied:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    merged = slot.merge()
    if are_tied:
        layers = (merged.get_input_embeddings(), merged.get_output_embeddings())
        if torch.equal(*(layer.get_parameter("weight") for layer in layers)):
            merged.tie_weights()
        else:
            for config in (merged.config, merged.config.get_text_config()):
                config.tie_word_embeddings = False
    return merged


def _restore_conv1d_layers(model: PreTrainedModel) -> None:
    """Turn linear layers back into GPT-2's `Conv1D` layers, which quantization has replaced."""
    with torch.device("meta"):
        original = type(model)(model.config)
    for name, layer in original.named_modules():
        linear = model.get_submodule(name)
        if isinstance(layer, Conv1D) and isinstance(linear, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
            layer.bias = linear.bias
            model.set_submodule(name, layer)


def _plain_layer(layer: Any) -> Any:
    """Return the base model's own layer inside of PEFT's."""
    while isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer


def _score_folder(folder: Path, scored: ScoredCheckpoint, device: torch.device) -> float:
    """Return the mean perplexity of the written model, loaded with plain transformers.

    Raises:
        RunError: it cannot be loaded.
    """
    recipe = scored.recipe
    section = ModelSection(
        pretrained_model_name_or_path=str(folder),
        dtype=recipe.model.dtype,
        attn_implementation=resolve_attn_implementation(recipe.model),
    )
    encoder = Encoder(load_tokenizer(section), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(scored.data_file)]
    try:
        model = load_model(section, None, device).eval()
    except (RuntimeError, UserError) as error:
        reason = first_line(error)
        raise RunError(f"the merged model cannot be loaded with transformers, so it was not kept: {reason}") from error
    verify_output_head(model, min(rows, key=len))
    tokens_per_batch = recipe.evaluation.tokens_per_batch or auto_tokens_per_batch(model, max(map(len, rows)))
    with ProgressLine("scoring", len(rows), "rows", is_logged=True) as progress:
        scores = score_rows(model, rows, tokens_per_batch=tokens_per_batch, on_batch=progress.advance)
    return summarize(scores).mean_perplexity


def _describe_perplexities(scored: ScoredCheckpoint, merged_perplexity: float) -> str:
    change = merged_perplexity / scored.entry.mean_perplexity - 1
    return (
        f"mean perplexity on {scored.data_file}: {scored.entry.mean_perplexity:.4f} before merging, "
        f"{merged_perplexity:.4f} after merging, relative change {change:+.1e}"
    )


def _check_perplexity(scored: ScoredCheckpoint, merged_perplexity: float) -> None:
    """Check that the merged model scores as the checkpoint did.

    Raises:
        RunError: rounding does not explain the change.
    """
    model, quantization = scored.recipe.model, scored.recipe.quantization
    saved_dtype = get_export_dtype(model.dtype)
    dtypes = {saved_dtype, model.dtype if quantization is None else quantization.bnb_4bit_compute_dtype}
    limit = max(MAX_RELATIVE_PERPLEXITY_CHANGE[dtype] for dtype in dtypes)
    if not abs(merged_perplexity / scored.entry.mean_perplexity - 1) <= limit:  # also true for NaN
        raise RunError(
            f"{_describe_perplexities(scored, merged_perplexity)}; rounding to {saved_dtype} explains at most "
            f"{limit:.1%}, so the merged model was not kept; use the adapter with its base model instead"
        )
