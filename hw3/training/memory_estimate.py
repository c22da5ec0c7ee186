"""Estimate the GPU memory of a training step from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hw3.config.recipe import Recipe
from hw3.cuda_graphs.training_step import HEAD_POSITIONS

GIB = 2**30

PARTS = ("weights", "adapters", "optimizer", "activations", "head")

# DeepSpeed's defaults, in parameters: how many stay gathered, how large the buffer is in which gradients are reduced.
ZERO3_LIVE, ZERO3_BUCKET = 10**9, 5 * 10**8


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part, as PyTorch counts them at the peak of a step."""

    weights: int
    adapters: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, part) for part in PARTS)


def weight_counts(config: Any) -> tuple[int, int]:
    """(in linear layers, elsewhere): parameters that 4-bit loading packs, and those that it leaves alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = sum(module.weight.numel() for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    return linear, model.num_parameters() - linear


def memory_of(
    recipe: Recipe,
    config: Any,
    counts: tuple[int, int],
    trained: int,
    *,
    rows: int,
    width: int,
    outputs: int,
    captured: bool,
    dequantized: bool,
    checkpointing: bool,
    optim: str,
    processes: int,
    sharded: str | None = None,
) -> Memory:
    """Memory of a step, counted from shapes; weights need not be loaded.

    Sharded, a GPU holds its part of weights, gradients and optimizer state, and what is gathered to compute with: under
    FSDP two layers, the one at work and the one that is fetched, and the head; under ZeRO-3 as many parameters as it
    lets live at once, or the head where that is larger. The scales of 4-bit weights are not sharded.

    Args:
        recipe: the recipe.
        config: the base's configuration.
        counts: from `weight_counts`.
        trained: trained parameters.
        rows: rows of one forward.
        width: tokens of the widest of them.
        outputs: most output tokens of one forward.
        captured: the captured step rather than TRL's.
        dequantized: 4-bit weights made plain.
        checkpointing: activations computed again.
        optim: the optimizer.
        processes: of the run.
        sharded: what shards the model among them, from `sharded_by`.
    """
    text = config.get_text_config()
    size = getattr(torch, recipe.model.dtype).itemsize
    linear, other = counts
    packed = recipe.quantization is not None and not dequantized
    # NF4: half a byte a weight and the scale of each 64, one byte (double quantization) or four.
    scale = 0 if not packed else (1 + 4 / 256 if recipe.quantization.bnb_4bit_use_double_quant else 4) / 64
    if packed and captured:
        scale += 4 / 64  # plain scales, made once
    full = recipe.lora is None
    # Trained weights are float32, with autocast's copies beside them.
    weights = (4 + size) * trained if full else int(linear * (0.5 + scale if packed else size) + other * size)
    adapters = (0 if full else 4 * trained) + 4 * trained  # themselves and their gradients
    if captured:
        adapters += size * trained  # copies in the compute dtype
    # Paged states are CUDA's managed memory, which moves to the CPU when the card is full; PyTorch does not count it.
    moments = 0 if optim.startswith("paged") else 2 if "8bit" in optim else 8
    optimizer = moments * trained // (processes if sharded else 1)
    if sharded is None and processes > 1:
        adapters += 4 * trained  # DistributedDataParallel's buckets
    if sharded is not None:
        whole = 0 if full else int(linear * scale)
        layers = linear * (0.5 if packed else size) / text.num_hidden_layers
        gathered = 2 * layers + text.vocab_size * text.hidden_size * size
        if sharded == "DeepSpeed":
            gathered = min(weights - whole, max(ZERO3_LIVE, text.vocab_size * text.hidden_size) * size)
            # In the base's dtype, with gradients; the optimizer's float32 copies of both, and the buffer.
            adapters = (2 * size + 8) * trained // processes + ZERO3_BUCKET * size
        else:
            adapters = 8 * trained // processes  # themselves and their gradients
        weights = int((weights - whole) / processes + whole + gathered)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads, tokens = text.num_attention_heads, rows * width
    eager = recipe.model.attn_implementation == "eager" or text.model_type == "gemma2"
    if captured:
        # Both inputs of the gated product, residuals, queries, keys, values and outputs a head; where no kernel hides
        # them, the scores, in float32 too.
        linear_inputs = 2 * text.intermediate_size + 3 * text.hidden_size + 4 * heads * head_dim
        scores = (4 + size) * heads * width if eager else 0
        kept = tokens * (size * linear_inputs + scores) * text.num_hidden_layers
        head = 2 * size * min(outputs, HEAD_POSITIONS) * text.vocab_size
        return Memory(weights, adapters, optimizer, kept, head)
    # TRL's step: four tensors of the gated product, norms in float32, what each adapter takes; scores as they are,
    # capped, masked, and in float32. Fitted to what Gemma-2-2B's and Llama-3-8B's shapes took.
    attention = head_dim * (heads + 2 * text.num_key_value_heads)
    scores = 12 * heads * width if eager else 0
    layer = int(tokens * (size * (4 * text.intermediate_size + 8.3 * text.hidden_size + attention) + scores))
    # The largest weights, made plain for a product and the one before it.
    unpacked = 2 * size * text.intermediate_size * text.hidden_size if packed else 0
    head = 4 * 3 * min(outputs, 4096) * min(text.vocab_size, 32768)  # TRL's head works in tiles of this size
    if not checkpointing:
        return Memory(weights, adapters, optimizer, layer * text.num_hidden_layers + unpacked, head)
    # Inputs of all layers, and one layer at work with its gradients: then the head's part is there no more.
    work = int(1.25 * layer) + unpacked
    kept = size * tokens * text.hidden_size * text.num_hidden_layers + work
    return Memory(weights, adapters, optimizer, kept, max(0, head - work))
