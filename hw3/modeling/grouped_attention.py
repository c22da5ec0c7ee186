"""Eager attention for one new token per row, without copies of keys and values for each query head."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from hw3.modeling.attention_masks import MASK_PER_LAYER_TYPE

GROUPED_EAGER = "eager_grouped"  # the name under which transformers finds it


def grouped_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute an architecture's eager attention of one new token per row.

    The query heads that share a key/value head become positions of one head, as `pack_gqa` of transformers does for
    sdpa.

    Args:
        module: the attention layer.
        query: shape (B, H, 1, D).
        key: shape (B, K, L, D), each head for H / K query heads.
        value: shape (B, K, L, D).
        attention_mask: shape (B, 1, 1, L), added to the scores.
        kwargs: passed to the architecture's own function.

    Returns:
        The outputs, shape (B, 1, H, D), and the attention weights, shape (B, K, H / K, L).
    """
    rows, heads, _, size = query.shape
    groups, module.num_key_value_groups = module.num_key_value_groups, 1
    try:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        grouped_query = query.reshape(rows, heads // groups, groups, size)
        output, weights = eager(module, grouped_query, key, value, attention_mask, **kwargs)
    finally:
        module.num_key_value_groups = groups
    return output.transpose(1, 2).reshape(rows, 1, heads, size), weights


AttentionInterface.register(GROUPED_EAGER, grouped_attention_forward)
AttentionMaskInterface.register(GROUPED_EAGER, eager_mask)


@contextmanager
def use_grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Replace eager attention by `grouped_attention_forward` inside the block, for architectures known to work."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before == "eager" and config.model_type in MASK_PER_LAYER_TYPE:
        config._attn_implementation = GROUPED_EAGER
    try:
        yield
    finally:
        config._attn_implementation = before
