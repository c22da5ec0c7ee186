"""Estimate the memory of rows while they are generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hw3.generation.decoder import CACHE_GROWTH_TOKENS
from hw3.modeling.float16_products import get_activation_dtype
from hw3.modeling.supported_models import LayerShape

CPU_BATCH_BYTES = 2**28  # about 90 rows of the tiny model, with which a step stays fast


def estimate_row_bytes(
    model: PreTrainedModel, prompt_lengths: Sequence[int], max_new_tokens: Sequence[int]
) -> list[int]:
    """Return each row's memory while it is decoded, in a batch with rows that need no more than it does.

    Such a batch is as wide as its longest prompt and its largest limit together.

    Args:
        model: the model.
        prompt_lengths: tokens of each prompt.
        max_new_tokens: limit of each row.
    """
    row_bytes = [0] * len(prompt_lengths)
    longest_prompt = largest_limit = 0
    for index in sorted(range(len(row_bytes)), key=lambda index: prompt_lengths[index] + max_new_tokens[index]):
        longest_prompt = max(longest_prompt, prompt_lengths[index])
        largest_limit = max(largest_limit, max_new_tokens[index])
        row_bytes[index] = _estimate_decoding_bytes(model, longest_prompt, largest_limit)
    return row_bytes


def estimate_prefill_bytes(model: PreTrainedModel, prefix_length: int, prompt_length: int) -> int:
    """Return the activations of one row in one layer while its prompt is computed, without the shared prefix."""
    shape, itemsize = LayerShape.from_config(model.config), get_activation_dtype(model.dtype).itemsize
    # MLP and residuals in the compute dtype, the adapters' float32 copies, attention scores with a float32 softmax.
    bytes_per_token = (itemsize + 4) * (4 * shape.intermediate_size + 8 * shape.hidden_size)
    bytes_per_token += shape.heads * prompt_length * (2 * itemsize + 4)
    return bytes_per_token * (prompt_length - prefix_length)


def get_batch_bytes(model: PreTrainedModel) -> int:
    """Return the memory that a batch may take: half of the GPU's free memory, or `CPU_BATCH_BYTES` on a CPU."""
    if model.device.type == "cpu":
        return CPU_BATCH_BYTES
    free, _ = torch.cuda.mem_get_info(model.device)
    return free // 2


def _estimate_decoding_bytes(model: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> int:
    """Return one row's bytes at its last token: the cache, one layer of it twice and once for all heads, and logits.

    An attention that does not read grouped keys and values in place copies them for all query heads of a layer.
    """
    config, shape = model.config.get_text_config(), LayerShape.from_config(model.config)
    cached_heads = (config.num_hidden_layers + 1) * shape.key_value_heads + shape.heads
    bytes_per_token = 2 * shape.head_dim * get_activation_dtype(model.dtype).itemsize * cached_heads
    return bytes_per_token * (prompt_length + max_new_tokens + CACHE_GROWTH_TOKENS) + 3 * 4 * config.vocab_size
