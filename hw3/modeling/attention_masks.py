"""Build the attention masks of supported architectures before the model's forward pass."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hw3.modeling.float16_products import get_activation_dtype

# Architectures whose backbone accepts finished masks, so that its forward has no control flow that depends on data.
# True: the backbone takes a dict with one mask per layer type. False: it takes one 4-D mask for all layers.
# The decoding step of these architectures can be captured too: nothing else in them reads values on the CPU.
MASK_PER_LAYER_TYPE = {"gemma2": True, "qwen3": True, "llama": False}


def build_attention_masks(
    model: PreTrainedModel, attention_mask: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Build additive causal masks in the form that the model's backbone takes.

    Args:
        model: the causal language model, for its layer types and its dtype.
        attention_mask: shape (B, L), 1 on tokens, 0 on padding.

    Returns:
        A mask of shape (B, 1, L, L), or one for each layer type.
    """
    config = model.config.get_text_config()
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    distance = positions[:, None] - positions[None, :]
    # Every position sees itself, padding too: a softmax over no position would be NaN.
    is_visible = ((distance >= 0) & attention_mask[:, None, None, :].bool()) | (distance == 0)

    dtype = get_activation_dtype(model.dtype)

    def to_additive(is_visible: torch.Tensor) -> torch.Tensor:
        return torch.where(is_visible, 0.0, torch.finfo(dtype).min).to(dtype)

    if not MASK_PER_LAYER_TYPE[config.model_type]:
        return to_additive(is_visible)
    masks = {"full_attention": to_additive(is_visible)}
    if getattr(config, "sliding_window", None) is not None:
        masks["sliding_attention"] = to_additive(is_visible & (distance < config.sliding_window))
    return masks
