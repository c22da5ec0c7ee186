"""Random models with two layers, for tests that need no training and no files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import character_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def write_base(folder: Path, config: PreTrainedConfig) -> Path:
    """Write a random model with the character tokenizer; return its folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


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


TRAINING_SHAPE: dict[str, Any] = {
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
        Gemma2Config(**TRAINING_SHAPE, sliding_window=4, final_logit_softcapping=3.0, attn_implementation="eager")
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TRAINING_SHAPE, attention_bias=True, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TRAINING_SHAPE)),
    "qwen3 with sliding windows": lambda: Qwen3ForCausalLM(
        Qwen3Config(**TRAINING_SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
}

_OWN_NAMES: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_OWN_SHAPE: dict[str, Any] = {**_OWN_NAMES, "hidden_size": 64, "initializer_range": 0.2}
_IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
# Architectures that scale their logits, or whose configuration lacks `num_key_value_heads`, or both names and layers of
# Llama. Large initial weights make random models differ from each other. Each with the adapters' `target_modules`.
OTHER_ARCHITECTURES: dict[str, tuple[PreTrainedConfig, str]] = {
    "granite": (
        GraniteConfig(
            **_OWN_SHAPE, **_IDS, intermediate_size=128, num_key_value_heads=2, logits_scaling=8.0,
            max_position_embeddings=256,
        ),
        "[q_proj, v_proj]",
    ),
    "cohere": (
        CohereConfig(**_OWN_SHAPE, **_IDS, intermediate_size=128, logit_scale=0.25, max_position_embeddings=256),
        "[q_proj, v_proj]",
    ),
    "gpt2": (
        GPT2Config(
            vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=96, initializer_range=0.2, **_IDS
        ),
        "[c_attn]",
    ),
    "gptj": (
        GPTJConfig(vocab_size=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256, **_IDS),
        "[q_proj, v_proj]",
    ),
    "gpt_neox": (
        GPTNeoXConfig(**_OWN_SHAPE, **_IDS, intermediate_size=128, max_position_embeddings=256),
        "[query_key_value]",
    ),
    "opt": (
        OPTConfig(
            **_OWN_NAMES, **_IDS, hidden_size=64, ffn_dim=128, word_embed_proj_dim=32, max_position_embeddings=256,
            init_std=0.2,
        ),
        "[q_proj, v_proj]",
    ),
    "bloom": (
        BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2, **_IDS),
        "[query_key_value]",
    ),
    "falcon": (FalconConfig(**_OWN_SHAPE, **_IDS), "[query_key_value]"),
    "mpt": (
        MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=64, initializer_range=0.2, max_seq_len=256, **_IDS),
        "[Wqkv]",
    ),
    "phi": (
        PhiConfig(**_OWN_SHAPE, **_IDS, intermediate_size=128, max_position_embeddings=256), "[q_proj, v_proj]"
    ),
}  # fmt: skip


def build_other_architecture(name: str) -> PreTrainedModel:
    """Build a random model of `OTHER_ARCHITECTURES` whose embeddings are not tied."""
    config = copy.deepcopy(OTHER_ARCHITECTURES[name][0])
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
