"""Additive attention masks, made before the model's forward pass."""

from __future__ import annotations

import torch
import torch._functorch.config
import torch._inductor.config
from transformers import PreTrainedModel

# Backbones that take finished masks, so that no code that depends on data runs: one for each kind of layer, or one 4-D
# mask for all. `hw3.decoding` captures these as well: there is nothing else in them that looks at values.
MASKS_BY_KIND = {"gemma2": True, "qwen3": True, "llama": False}


def masks_for(model: PreTrainedModel, attention_mask: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive causal masks, as the backbone's layers take them.

    Args:
        model: the causal language model, for its kinds of layers and its dtype.
        attention_mask: shape (B, L), 1 on tokens, 0 on padding.

    Returns:
        A mask of shape (B, 1, L, L), or one for each kind of attention.
    """
    config = model.config.get_text_config()
    order = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    distance = order[:, None] - order[None, :]
    # A position sees itself, padding too, so that no softmax runs over nothing.
    seen = ((distance >= 0) & attention_mask[:, None, None, :].bool()) | (distance == 0)

    def additive(visible: torch.Tensor) -> torch.Tensor:
        return torch.where(visible, 0.0, torch.finfo(model.dtype).min).to(model.dtype)

    if not MASKS_BY_KIND[config.model_type]:
        return additive(seen)
    masks = {"full_attention": additive(seen)}
    if getattr(config, "sliding_window", None) is not None:
        masks["sliding_attention"] = additive(seen & (distance < config.sliding_window))
    return masks
