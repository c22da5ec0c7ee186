"""A run's base, tokenizer and weights as scoring and generation use them: one arithmetic, one identity."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hw3.common.errors import UserError, shorten
from hw3.config.recipe import Recipe, load_recipe, prompt_file
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.modeling.adapter_io import AdapterFiles, BadAdapter, read_adapter
from hw3.modeling.adapter_slot import AdapterSlot, load_weights
from hw3.modeling.devices import device_of
from hw3.modeling.fingerprint import ADAPTER_CONFIG, base_sha256, tokenizer_sha256
from hw3.modeling.loading import base_parameters, load_base, load_config, load_tokenizer
from hw3.modeling.quantization import dequantize, scores_dequantized
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.run_dir import RECIPE, TOKENIZER


def recipe_of(run: Path, *, recipe_path: Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """The recipe as it was run.

    Args:
        run: the run folder.
        recipe_path: the recipe to take where there is no run yet.
        overrides: `section.key=value` assignments for this call.

    Raises:
        UserError: there is no such run, or its recipe is wrong.
    """
    if (run / RECIPE).is_file():
        return load_recipe(run / RECIPE, overrides)
    if recipe_path is None:
        raise UserError(f"{run}: no such run; train it first (make train, hw3 train RECIPE.yaml --run {run})")
    return load_recipe(recipe_path, overrides)


def tokenizer_of(run: Path, recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that the run was trained with."""
    if not (run / TOKENIZER).is_dir():
        return load_tokenizer(recipe.model)
    update = {"pretrained_model_name_or_path": str(run / TOKENIZER), "revision": None}
    return load_tokenizer(recipe.model.model_copy(update=update))


def open_run(run: Path, recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Any, dict[str, Any]]:
    """A run's tokenizer, its base's configuration, and what every figure and answer of it depends on, by content.

    Checkpoint and prompt come on top. The base's weights are hashed while the tokenizer is read.

    Raises:
        UserError: base or tokenizer cannot be had; says how to get it.
    """
    config = load_config(recipe.model)
    with ThreadPoolExecutor(1) as thread:
        base = thread.submit(base_sha256, recipe.model, config)
        tokenizer = tokenizer_of(run, recipe)
        content = {
            "tokenizer": tokenizer_sha256(tokenizer),
            "dtype": recipe.model.dtype,
            "attn_implementation": recipe.model.attn_implementation,
            "quantization": None if recipe.quantization is None else recipe.quantization.model_dump(),
            "dequantized": scores_dequantized(recipe, base_parameters(config), device_of(recipe)),
        }
        return tokenizer, config, {"base": base.result(), **content}


def prompt_content(prompt: Prompt, examples: list[Example]) -> dict[str, Any]:
    """What a prompt and the worked examples shown in it add to that."""
    return {
        "prompt": prompt.model_dump(exclude={"examples"}),
        "examples": [example.model_dump() for example in examples],
    }


def content_key(parts: dict[str, Any]) -> str:
    """16 hex digits that stand for content: the same parts, the same key."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def prompt_name(prompt: Prompt) -> str:
    """The file of `recipes/prompts/` with this content; `recipe` where there is none."""
    found = prompt_file(prompt.sha256)
    return "recipe" if found is None else found[0].stem


def encode_rows(encoder: Encoder, rows: list[Row], examples: list[Example], config: Any, name: str) -> list[EncodedRow]:
    """Rows as ids, none cut and none dropped: `data.max_length` is about training.

    Raises:
        UserError: rows are longer than the positions that the model knows.
    """
    encoded = [encoder.encode(row, examples) for row in rows]
    most = config.get_text_config().max_position_embeddings
    problems = [
        f"{name}: row {number} (id {row.id}): {len(row)} tokens with {len(examples)} worked examples, "
        f"the model takes {most}"
        for number, row in enumerate(encoded, 1)
        if len(row) > most
    ]
    if problems:
        raise UserError(*shorten(problems))
    return encoded


def load_for_inference(recipe: Recipe, *, dequantized: bool) -> PreTrainedModel:
    """The base in evaluation mode, no adapter in it yet.

    Args:
        recipe: the run's.
        dequantized: whether 4-bit weights are made plain, as `open_run` found.

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    device = device_of(recipe)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what Triton compiles runs on the current one
    model = load_base(recipe, device).eval()
    return dequantize(model) if dequantized else model


def load_checkpoint(
    slot: AdapterSlot, model: PreTrainedModel, checkpoint: Checkpoint, adapter: AdapterFiles | None = None
) -> None:
    """Put a checkpoint's adapter, or its full weights, into the loaded base.

    Args:
        slot: where adapters go.
        model: the base.
        checkpoint: whose figures or answers will be kept as those of its `sha256`.
        adapter: its files, where they have been read already.

    Raises:
        BadAdapter: the folder does not hold weights for this base, or no longer those of `checkpoint.sha256`.
    """
    if adapter is None and holds_adapter(checkpoint.path):
        adapter = read_adapter(checkpoint.path)
    found = load_weights(model, checkpoint.path) if adapter is None else adapter.sha256
    if found != checkpoint.sha256:
        raise BadAdapter(
            f"{checkpoint.path}: its weights are not those that were hashed when it was completed or this command "
            "began; were they written to since?"
        )
    if adapter is not None:
        slot.put(adapter)


def holds_adapter(folder: Path) -> bool:
    """Whether a checkpoint is an adapter, rather than all of a model's weights."""
    return (folder / ADAPTER_CONFIG).exists()
