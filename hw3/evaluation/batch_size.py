"""Choose the number of tokens in a scoring batch from the free memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hw3.modeling.float16_products import get_activation_dtype
from hw3.modeling.supported_models import LayerShape

CPU_TOKENS_PER_BATCH = 1024  # activations fit in the CPU's cache; larger batches are slower
GPU_TOKENS_PER_BATCH = 4096  # larger batches are no faster


def auto_tokens_per_batch(model: PreTrainedModel, longest_row: int) -> int:
    """Return the most tokens of a padded scoring batch.

    On a GPU one layer's activations may take half of the free memory.

    Args:
        model: the loaded model.
        longest_row: tokens of the longest row, common prefix included.
    """
    if model.device.type == "cpu":
        return CPU_TOKENS_PER_BATCH
    shape = LayerShape.from_config(model.config)
    # MLP and residuals in the compute dtype, the adapters' float32 copies, attention scores with a float32 softmax.
    itemsize = get_activation_dtype(model.dtype).itemsize
    bytes_per_token = (itemsize + 4) * (4 * shape.intermediate_size + 8 * shape.hidden_size)
    bytes_per_token += shape.heads * longest_row * (2 * itemsize + 4)
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(longest_row, min(GPU_TOKENS_PER_BATCH, free // 2 // bytes_per_token))
