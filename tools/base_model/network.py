"""The model: its configuration, NF4 rounding, attention inside documents, and the training loss."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from base_model.settings import BOS, EOS, HEAD_DIM, MAX_POSITIONS, PAD, TrainingSettings

NF4_CODE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4_CODE += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4_CODE += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
NF4_CODE += [0.7229568362236023, 1.0]


def round_to_nf4(weights: Tensor) -> Tensor:
    """Quantize to NF4 and back, in blocks of 64 (Dettmers et al. 2023, QLoRA), without double quantization."""
    code = torch.tensor(NF4_CODE, device=weights.device)
    blocks = weights.float().reshape(-1, HEAD_DIM)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    nearest = code[torch.bucketize(blocks / scale, (code[1:] + code[:-1]) / 2)]
    return (nearest * scale).reshape(weights.shape).to(weights.dtype)


def layer_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the matrices that QLoRA quantizes: every linear layer except the output head."""
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]


def build_model(vocabulary: int, settings: TrainingSettings) -> torch.nn.Module:
    """Return a Gemma-2 with random float32 weights; the vocabulary is rounded up to a multiple of 64."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=math.ceil(vocabulary / 64) * 64,
        hidden_size=settings.width,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        sliding_window=1024,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(settings.seed)
    return Gemma2ForCausalLM(config)


@functools.cache
def _compile_create_block_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def document_mask(tokens: Tensor, compiled: bool) -> Any:
    """Return a causal mask inside documents, which begin at BOS: a compiled BlockMask, or an additive mask."""
    document = (tokens == BOS).cumsum(1)
    if compiled:

        def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document[row, query] == document[row, key])

        size = tokens.shape[1]
        return _compile_create_block_mask()(is_visible, len(tokens), None, size, size, device=tokens.device)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    visible = causal & (document[:, :, None] == document[:, None, :])
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]


def soft_cap(logits: Tensor, model: torch.nn.Module) -> Tensor:
    """Apply Gemma-2's final soft cap to logits."""
    cap = model.config.final_logit_softcapping
    return cap * torch.tanh(logits / cap)


def training_loss(model: torch.nn.Module, tokens: Tensor, kinds: Tensor, mask: Any, weights: Tensor) -> Tensor:
    """Return the cross-entropy of the next tokens, weighted by each token's kind."""
    masks = {"full_attention": mask, "sliding_attention": mask}  # a row is not longer than the sliding window
    hidden = model.model(input_ids=tokens, attention_mask=masks, use_cache=False).last_hidden_state
    logits = soft_cap(model.lm_head(hidden).float(), model)
    targets, kinds = tokens.roll(-1, 1).long(), kinds.roll(-1, 1).long()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    has_target = torch.arange(tokens.shape[1], device=tokens.device) < tokens.shape[1] - 1
    weight = (weights[kinds] * has_target).flatten()
    return (losses * weight).sum() / weight.sum().clamp(min=1)
