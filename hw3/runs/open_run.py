"""Load a run's tokenizer, base model and checkpoints for scoring and generation, which share one arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hw3.common.errors import UserError, truncate_problems
from hw3.config.recipe import Recipe
from hw3.data.input_limits import InputLimits
from hw3.data.prompt import Example
from hw3.data.rows import Row
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.modeling.adapter_io import AdapterFiles, InvalidAdapterError, read_adapter
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.devices import find_old_gpu, select_device
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
    def input_limits(self) -> InputLimits:
        """What the base model takes as input."""
        return InputLimits.from_config(self.config)


def open_run(run: Run, recipe: Recipe) -> OpenedRun:
    """Load tokenizer and configuration. Another thread hashes the base model at the same time.

    Raises:
        UserError: base model or tokenizer is not available, or they do not fit each other, or the GPU is too old; the
            message says what to do.
    """
    if select_device(recipe).type == "cuda" and (old_gpu := find_old_gpu()) is not None:
        raise UserError(old_gpu)
    config = load_model_config(recipe.model)
    with ThreadPoolExecutor(1) as thread:
        base = thread.submit(hash_base_model, recipe.model)
        tokenizer = run.load_tokenizer(recipe)
        if problems := InputLimits.from_config(config).find_special_token_problems(tokenizer):
            raise UserError(*problems)
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
    encoder: Encoder, rows: list[Row], examples: list[Example], limits: InputLimits, source: str
) -> list[EncodedRow]:
    """Encode all rows in full. `data.max_length` limits training rows only.

    Args:
        encoder: tokenizer and prompt.
        rows: the rows.
        examples: few-shot examples in the prompt.
        limits: what the model takes as input.
        source: name of the rows' file, for messages.

    Raises:
        UserError: the model does not take rows: they have too many tokens, or tokens without an embedding.
    """
    encoded = [encoder.encode(row, examples) for row in rows]
    if problems := limits.find_row_problems(encoder.tokenizer, encoded, source, shots=len(examples)):
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


def load_slot(recipe: Recipe, *, dequantized: bool) -> AdapterSlot:
    """Load the base model into a slot for adapters, which can load it again.

    Args:
        recipe: the run's recipe.
        dequantized: as for `load_for_inference`.

    Raises:
        UserError: the base model is not available; the message says how to get it.
    """
    base = load_for_inference(recipe, dequantized=dequantized)
    return AdapterSlot(base, partial(load_for_inference, recipe, dequantized=False), dequantized=dequantized)


def load_checkpoint(slot: AdapterSlot, checkpoint: Checkpoint, adapter: AdapterFiles | None = None) -> None:
    """Put a checkpoint's adapter, or its full weights, into the base model of a slot.

    Args:
        slot: the slot, whose model may become another object.
        checkpoint: the checkpoint; results will be stored under its hash.
        adapter: its files, if they have been read already.

    Raises:
        InvalidAdapterError: the checkpoint cannot be used with this base model, or it changed after it was hashed.
    """
    if adapter is None and checkpoint.is_adapter:
        adapter = read_adapter(checkpoint.path)
    sha256 = slot.load_full_weights(checkpoint.path) if adapter is None else adapter.sha256
    if sha256 != checkpoint.sha256:
        raise InvalidAdapterError(
            f"{checkpoint.path}: the weights changed after the checkpoint was completed, or since this command began; "
            "restore them, or train again"
        )
    if adapter is not None:
        slot.set(adapter)
