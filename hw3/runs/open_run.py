"""Load a run's tokenizer, base model and checkpoints for scoring and generation, which share one arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hw3.common.errors import UserError, truncate_problems
from hw3.config.recipe import Recipe
from hw3.data.prompt import Example
from hw3.data.rows import Row
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.modeling.adapter_io import AdapterFiles, InvalidAdapterError, read_adapter
from hw3.modeling.adapter_slot import AdapterSlot, load_full_weights
from hw3.modeling.devices import select_device
from hw3.modeling.fingerprint import hash_base_model, hash_tokenizer
from hw3.modeling.loading import count_base_parameters, load_base_model, load_model_config
from hw3.modeling.quantization import dequantize, should_dequantize
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.identity import ModelIdentity
from hw3.runs.run import Run


@dataclass(frozen=True)
class OpenedRun:
    """A run that is ready for scoring or generation; no weights are loaded.

    Attributes:
        tokenizer: the tokenizer that the run was trained with.
        config: configuration of the base model.
        identity: what every score and prediction of the run depends on.
    """

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    identity: ModelIdentity

    @property
    def max_positions(self) -> int:
        """The most tokens that the base model takes."""
        return self.config.get_text_config().max_position_embeddings


def open_run(run: Run, recipe: Recipe) -> OpenedRun:
    """Load tokenizer and configuration. Another thread hashes the base model at the same time.

    Raises:
        UserError: base model or tokenizer is not available; the message says how to get it.
    """
    config = load_model_config(recipe.model)
    with ThreadPoolExecutor(1) as thread:
        base = thread.submit(hash_base_model, recipe.model)
        tokenizer = run.load_tokenizer(recipe)
        identity = ModelIdentity(
            base=base.result(),
            tokenizer=hash_tokenizer(tokenizer),
            dtype=recipe.model.dtype,
            attn_implementation=recipe.model.attn_implementation,
            quantization=None if recipe.quantization is None else recipe.quantization.model_dump(),
            dequantized=should_dequantize(recipe, count_base_parameters(config), select_device(recipe)),
        )
    return OpenedRun(tokenizer, config, identity)


def encode_rows(
    encoder: Encoder, rows: list[Row], examples: list[Example], max_positions: int, source: str
) -> list[EncodedRow]:
    """Encode all rows in full. `data.max_length` limits training rows only.

    Args:
        encoder: tokenizer and prompt.
        rows: the rows.
        examples: few-shot examples in the prompt.
        max_positions: the most tokens that the model takes.
        source: name of the rows' file, for messages.

    Raises:
        UserError: rows have more tokens than the model takes.
    """
    encoded = [encoder.encode(row, examples) for row in rows]
    problems = [
        f"{source}: row {number} (id {row.id}): {len(row)} tokens with {len(examples)} few-shot examples, "
        f"the model takes {max_positions}"
        for number, row in enumerate(encoded, 1)
        if len(row) > max_positions
    ]
    if problems:
        raise UserError(*truncate_problems(problems))
    return encoded


def load_for_inference(recipe: Recipe, *, dequantized: bool) -> PreTrainedModel:
    """Load the base model in evaluation mode, without an adapter.

    Args:
        recipe: the run's recipe.
        dequantized: whether to dequantize 4-bit weights, from `ModelIdentity.dequantized`.

    Raises:
        UserError: the base model is not available; the message says how to get it.
    """
    device = select_device(recipe)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton kernels run on the current device
    model = load_base_model(recipe, device).eval()
    return dequantize(model) if dequantized else model


def load_checkpoint(
    slot: AdapterSlot, model: PreTrainedModel, checkpoint: Checkpoint, adapter: AdapterFiles | None = None
) -> None:
    """Put a checkpoint's adapter, or its full weights, into the loaded base model.

    Args:
        slot: the slot for adapters in `model`.
        model: the base model.
        checkpoint: the checkpoint; results will be stored under its hash.
        adapter: its files, if they have been read already.

    Raises:
        InvalidAdapterError: the folder has no weights for this base model, or they changed after they were hashed.
    """
    if adapter is None and checkpoint.is_adapter:
        adapter = read_adapter(checkpoint.path)
    sha256 = load_full_weights(model, checkpoint.path) if adapter is None else adapter.sha256
    if sha256 != checkpoint.sha256:
        raise InvalidAdapterError(
            f"{checkpoint.path}: the weights changed after the checkpoint was completed, or since this command began; "
            "restore them, or train again"
        )
    if adapter is not None:
        slot.set(adapter)
