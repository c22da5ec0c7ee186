"""Estimate the GPU memory of a training step from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hw3.config.recipe import Recipe
from hw3.modeling.float16_products import get_activation_dtype
from hw3.modeling.supported_models import LayerShape
from hw3.training.cuda_graph_support import HEAD_CHUNK_POSITIONS
from hw3.training.sharding import Sharding

GIB = 2**30

MEMORY_PARTS = ("weights", "adapters", "optimizer", "activations", "head")

# DeepSpeed's defaults: parameters that may stay gathered, and size of the buffer in which gradients are reduced.
ZERO3_LIVE_PARAMETERS, ZERO3_BUCKET_PARAMETERS = 10**9, 5 * 10**8
# Tiles in which TRL 1.16 computes its output head.
TRL_HEAD_TOKENS, TRL_HEAD_VOCABULARY = 4096, 32768


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU, by part, as PyTorch counts them at the peak of a step.

    Attributes:
        weights: of the base model, and what sharding gathers of it; of the model under full fine-tuning.
        adapters: trained parameters that are not counted under `weights`, and all gradients.
        optimizer: the optimizer's state.
        activations: what the backward pass needs.
        head: the output head's temporary memory.
    """

    weights: int = 0
    adapters: int = 0
    optimizer: int = 0
    activations: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, part) for part in MEMORY_PARTS)


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights in a base model.

    Attributes:
        linear: weights in linear layers, which quantization stores in 4 bits.
        other: weights elsewhere, which quantization leaves in the compute dtype.
    """

    linear: int
    other: int


@dataclass(frozen=True)
class StepShape:
    """The longest batch of a step, and how the step is computed.

    Attributes:
        rows: rows of the forward pass.
        length: tokens of its longest row.
        output_tokens: the most output tokens that it may have.
        optim: the optimizer's name, as in `training.optim`.
        cuda_graphs: whether the CUDA-graph step is used rather than TRL's.
        dequantized: whether 4-bit weights have been dequantized.
        activation_checkpointing: whether activations are recomputed in the backward pass.
        processes: number of processes of the run.
        sharding: what shards the model among them.
    """

    rows: int
    length: int
    output_tokens: int
    optim: str
    cuda_graphs: bool = False
    dequantized: bool = False
    activation_checkpointing: bool = False
    processes: int = 1
    sharding: Sharding | None = None


def count_weights(config: Any) -> WeightCounts:
    """Count the weights of a base model from its configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = sum(module.weight.numel() for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    return WeightCounts(linear, model.num_parameters() - linear)


def estimate_memory(
    recipe: Recipe, config: Any, counts: WeightCounts, trained_parameters: int, step: StepShape
) -> MemoryEstimate:
    """Estimate the memory of a step on one GPU from shapes; no weights are loaded.

    Args:
        recipe: the recipe.
        config: the base model's configuration.
        counts: weights of the base model, from `count_weights`.
        trained_parameters: number of trained parameters.
        step: the step.
    """
    weights, adapters, optimizer = _state_bytes(recipe, config, counts, trained_parameters, step)
    if step.cuda_graphs:
        activations, head = _cuda_graph_activation_bytes(recipe, config, step)
    else:
        activations, head = _trl_activation_bytes(recipe, config, step)
    return MemoryEstimate(weights, adapters, optimizer, activations, head)


def _state_bytes(
    recipe: Recipe, config: Any, counts: WeightCounts, trained: int, step: StepShape
) -> tuple[int, int, int]:
    """Return the bytes of (weights, adapters with their gradients, optimizer state) on one GPU."""
    itemsize = getattr(torch, recipe.model.dtype).itemsize
    scale = _scale_bytes_per_weight(recipe, step)
    weight_size = 0.5 + scale if _is_4bit(recipe, step) else itemsize
    full = recipe.lora is None
    # Under full fine-tuning weights are float32, and autocast makes copies in the compute dtype.
    weights = (4 + itemsize) * trained if full else int(counts.linear * weight_size + counts.other * itemsize)
    # float32 adapters and float32 gradients.
    adapters = (0 if full else 4 * trained) + 4 * trained
    if step.cuda_graphs:
        adapters += _activation_bytes(recipe) * trained  # copies in the dtype of the activations
    # Paged states are CUDA's managed memory. It moves to the CPU when the GPU is full, and PyTorch does not count it.
    state_bytes = 0 if step.optim.startswith("paged") else 2 if "8bit" in step.optim else 8
    optimizer = state_bytes * trained // (step.processes if step.sharding else 1)
    if step.sharding is None:
        if step.processes > 1:
            adapters += 4 * trained  # the gradient buckets of DistributedDataParallel
        return weights, adapters, optimizer
    scales = 0 if full else int(counts.linear * scale)
    weights, adapters = _sharded_bytes(recipe, config, counts, trained, step, weights, scales)
    return weights, adapters, optimizer


def _sharded_bytes(
    recipe: Recipe, config: Any, counts: WeightCounts, trained: int, step: StepShape, weights: int, scales: int
) -> tuple[int, int]:
    """Return the bytes of (weights, adapters with their gradients) on one GPU when FSDP2 or ZeRO-3 shards them.

    A GPU holds its shard and the parameters that are gathered for computing. FSDP2 gathers two layers (the current one
    and the next) and the head. ZeRO-3 gathers as many parameters as it may keep, or the head if that is larger. The
    scales of 4-bit weights are not sharded.
    """
    text, itemsize = config.get_text_config(), getattr(torch, recipe.model.dtype).itemsize
    head_parameters = text.vocab_size * text.hidden_size
    if step.sharding == "DeepSpeed":
        gathered = min(weights - scales, max(ZERO3_LIVE_PARAMETERS, head_parameters) * itemsize)
        # Adapters and gradients in the base model's dtype, the optimizer's float32 copies of both, and the buffer.
        adapters = (2 * itemsize + 8) * trained // step.processes + ZERO3_BUCKET_PARAMETERS * itemsize
    else:
        layer = counts.linear * (0.5 if _is_4bit(recipe, step) else itemsize) / text.num_hidden_layers
        gathered = 2 * layer + head_parameters * itemsize
        adapters = 8 * trained // step.processes
    return int((weights - scales) / step.processes + scales + gathered), adapters


def _is_4bit(recipe: Recipe, step: StepShape) -> bool:
    """Return whether the base model's linear layers are in 4 bits during the step."""
    return recipe.quantization is not None and not step.dequantized


def _scale_bytes_per_weight(recipe: Recipe, step: StepShape) -> float:
    """Return the bytes of quantization scales per weight: NF4 has one scale for each 64 weights."""
    if recipe.quantization is None or step.dequantized:
        return 0
    # Double quantization stores a scale in one byte, and four more bytes for each 256 scales.
    scale = (1 + 4 / 256 if recipe.quantization.bnb_4bit_use_double_quant else 4) / 64
    # The CUDA-graph step also keeps the scales in float32.
    return scale + 4 / 64 if step.cuda_graphs else scale


def _activation_bytes(recipe: Recipe) -> int:
    """Return the bytes of an element of a hidden state."""
    return get_activation_dtype(getattr(torch, recipe.model.dtype)).itemsize


def _stores_attention_scores(recipe: Recipe, text: Any) -> bool:
    """Return whether attention scores are stored, because no fused kernel computes them."""
    return recipe.model.attn_implementation == "eager" or text.model_type == "gemma2"


def _cuda_graph_activation_bytes(recipe: Recipe, config: Any, step: StepShape) -> tuple[int, int]:
    """Return the bytes of (activations, output head) of the CUDA-graph step."""
    text, itemsize = config.get_text_config(), _activation_bytes(recipe)
    shape = LayerShape.from_config(config)
    # Both inputs of the gated product, residuals, and each head's queries, keys, values and outputs.
    elements = 2 * shape.intermediate_size + 3 * shape.hidden_size + 4 * shape.heads * shape.head_dim
    # Attention scores are stored in the compute dtype and in float32.
    scores = (4 + itemsize) * shape.heads * step.length if _stores_attention_scores(recipe, text) else 0
    activations = step.rows * step.length * (itemsize * elements + scores) * text.num_hidden_layers
    head = 2 * itemsize * min(step.output_tokens, HEAD_CHUNK_POSITIONS) * text.vocab_size
    return activations, head


def _trl_activation_bytes(recipe: Recipe, config: Any, step: StepShape) -> tuple[int, int]:
    """Return the bytes of (activations, output head) of TRL's step.

    The factors were fitted to measurements of Gemma-2-2B's and Llama-3-8B's shapes.
    """
    text, itemsize = config.get_text_config(), _activation_bytes(recipe)
    shape, tokens = LayerShape.from_config(config), step.rows * step.length
    attention = shape.head_dim * (shape.heads + 2 * shape.key_value_heads)
    # Four tensors of the gated product, norms in float32, and the inputs of the adapters.
    elements = 4 * shape.intermediate_size + 8.3 * shape.hidden_size + attention
    # Attention scores are stored as computed, capped, masked, and in float32.
    scores = 12 * shape.heads * step.length if _stores_attention_scores(recipe, text) else 0
    layer = int(tokens * (itemsize * elements + scores))
    # The largest weights are dequantized for a product while those of the product before are still there.
    weight_size = 2 * getattr(torch, recipe.model.dtype).itemsize
    dequantized = weight_size * shape.intermediate_size * shape.hidden_size if _is_4bit(recipe, step) else 0
    head = 4 * 3 * min(step.output_tokens, TRL_HEAD_TOKENS) * min(text.vocab_size, TRL_HEAD_VOCABULARY)
    if not step.activation_checkpointing:
        return layer * text.num_hidden_layers + dequantized, head
    # The inputs of all layers, and one recomputed layer with its gradients. By then the head's memory is free again.
    recomputed = int(1.25 * layer) + dequantized
    layer_inputs = itemsize * tokens * shape.hidden_size * text.num_hidden_layers
    return layer_inputs + recomputed, max(0, head - recomputed)
