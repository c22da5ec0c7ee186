"""Random models with two layers, for tests that need no training and no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

GENERATION_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
}


def build_gemma2() -> PreTrainedModel:
    """Build a Gemma-2 with soft-caps and a sliding window of 16 tokens, shorter than the prompts of all tests.

    Its embeddings are not tied: a tied model would repeat its last token.
    """
    torch.manual_seed(0)
    config = Gemma2Config(
        **GENERATION_SHAPE,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        tie_word_embeddings=False,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()


def build_llama() -> PreTrainedModel:
    """Build a Llama with grouped heads under sdpa, without soft-caps."""
    torch.manual_seed(0)
    config = LlamaConfig(**GENERATION_SHAPE, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


_TRAINING_SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
# Models whose training step can be captured.
TRAINING_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_TRAINING_SHAPE, sliding_window=4, final_logit_softcapping=3.0, attn_implementation="eager")
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_TRAINING_SHAPE, attention_bias=True, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_TRAINING_SHAPE)),
    "qwen3 with sliding windows": lambda: Qwen3ForCausalLM(
        Qwen3Config(**_TRAINING_SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
}
