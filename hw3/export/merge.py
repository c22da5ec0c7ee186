"""`hw3 export`: a checkpoint as a model of its own, the adapter merged into the dequantized base."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hw3.common.atomic_io import open_to_others, write_atomically
from hw3.common.disk import check_new, gib
from hw3.common.errors import RunFailed, UserError
from hw3.config.recipe import Recipe
from hw3.config.schema import ModelSection
from hw3.data.prompt import PLACEHOLDER, Prompt
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.batch_size import tokens_that_fit
from hw3.evaluation.perplexity import score_rows, summarize
from hw3.evaluation.selection import Scored, scored_checkpoint
from hw3.export.model_card import card
from hw3.generation.batch_generate import generation_config, stop_ids
from hw3.modeling.adapter_io import BadAdapter
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.devices import device_of
from hw3.modeling.loading import attention_of, base_parameters, load_base, load_config, load_model, load_tokenizer
from hw3.modeling.logits import check_head
from hw3.modeling.quantization import dequantize, holds
from hw3.runs.open_run import load_checkpoint, tokenizer_of

# The merged weights are not the scored ones: those were a base and an apart adapter, each rounded for itself.
WARN_ABOVE = 0.01


def export_run(run: Path, *, checkpoint: str = "best", out: Path | None = None) -> int:
    """Write a checkpoint as a whole model with tokenizer and card, load it afresh, and score it.

    Args:
        run: the run folder, scored on its `data.eval`.
        checkpoint: which one; the best by default.
        out: the folder to make; `RUN-export` by default.

    Returns:
        0.

    Raises:
        UserError: the run, a file or an argument does not fit.
        RunFailed: the checkpoint's weights cannot be read.
    """
    scored = scored_checkpoint(run, checkpoint)
    out = out or run.with_name(f"{run.name}-export")
    check_new(out, "another folder (--out)")
    recipe = scored.recipe
    if (recipe.lora or {}).get("layer_replication"):
        raise UserError(f"{run}: lora.layer_replication: replicated layers share their weights and cannot be merged")
    tokenizer = tokenizer_of(run, recipe)
    if not recipe.prompt.chat_template:
        tokenizer.chat_template = prompt_as_template(recipe.prompt, tokenizer)
    weights = base_parameters(load_config(recipe.model)) * getattr(torch, recipe.model.dtype).itemsize
    device = _device_for(recipe, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    if weights > (free := shutil.disk_usage(out.parent).free):
        raise UserError(f"{out}: the model takes {gib(weights)}, {gib(free)} free; free some, or give --out elsewhere")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "export"
        _write_model(folder, scored, tokenizer, device)
        gc.collect()
        torch.cuda.empty_cache()
        before, after = scored.entry["mean_perplexity"], _score(folder, scored, device)
        write_atomically(folder / "README.md", card(scored, out.name, after))
        size = sum(file.stat().st_size for file in folder.iterdir())
        os.rename(folder, out)
    change = after / before - 1
    print(f"{out}: {scored.checkpoint.name} of {run}, {gib(size)}")
    print(f"  mean perplexity on {scored.data}: {before:.4f} before merging, {after:.4f} after, {change:+.1e} of it")
    if abs(change) > WARN_ABOVE:
        print(
            f"  warning: more than {WARN_ABOVE:.0%} apart: rounding the merged weights to {recipe.model.dtype} changes "
            "this model; serve the adapter on its quantized base instead"
        )
    return 0


def prompt_as_template(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """The run's prompt as a chat template, so that a chat server asks the model as it was trained.

    The last user message becomes the instruction; earlier turns become worked examples.
    """
    before, after = prompt.turn.split(PLACEHOLDER)
    # Jinja reads the escapes of JSON's strings.
    system, before, after, separator = (
        json.dumps(text, ensure_ascii=False)
        for text in ("" if prompt.system is None else f"{prompt.system}\n", before, after, prompt.example_separator)
    )
    refuse = json.dumps("the model was trained with a fixed system text: give user and assistant turns only")
    bos = "" if tokenizer.bos_token is None else "{{- bos_token -}}"
    return (
        f"{bos}{{{{- {system} -}}}}{{%- for message in messages -%}}"
        f"{{%- if message['role'] == 'user' -%}}{{{{- {before} + message['content'] + {after} -}}}}"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{- message['content'] + {separator} -}}}}"
        f"{{%- else -%}}{{{{- raise_exception({refuse}) -}}}}{{%- endif -%}}{{%- endfor -%}}"
    )


def _device_for(recipe: Recipe, weights: int) -> torch.device:
    """The run's device, or the CPU where the weights of the whole model do not fit the GPU."""
    device = device_of(recipe)
    if holds(device, weights):
        return device
    print(f"the whole model takes {gib(weights)}, too much for this GPU: merged and scored on the CPU")
    return torch.device("cpu")


def _write_model(folder: Path, scored: Scored, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
    recipe = scored.recipe
    model = load_base(recipe, device).eval()
    stops = stop_ids(model, tokenizer.eos_token_id)
    if recipe.quantization is not None:
        model = dequantize(model)
    slot = AdapterSlot(model)
    try:
        load_checkpoint(slot, model, scored.checkpoint)
    except BadAdapter as error:
        raise RunFailed(str(error)) from error
    if recipe.lora is not None:
        model = slot.merge()
    model.config.use_cache = True  # off while training and scoring
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = generation_config(recipe.generation, stops)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    open_to_others(folder)


def _score(folder: Path, scored: Scored, device: torch.device) -> float:
    """Mean perplexity of the written folder, loaded as anybody would."""
    recipe = scored.recipe
    section = ModelSection(
        pretrained_model_name_or_path=str(folder),
        dtype=recipe.model.dtype,
        attn_implementation=attention_of(recipe.model),
    )
    encoder = Encoder(load_tokenizer(section), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(scored.data)]
    model = load_model(section, None, device).eval()
    check_head(model, min(rows, key=len))
    budget = recipe.evaluation.tokens_per_batch or tokens_that_fit(model, max(map(len, rows)))
    with tqdm(total=len(rows), desc="merged", unit="row", disable=None, leave=False) as bar:
        scores = score_rows(model, rows, tokens_per_batch=budget, on_batch=bar.update)
    return summarize(scores).mean_perplexity
