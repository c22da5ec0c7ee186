"""Check that an architecture can be trained, scored and generated with, and read the shape of its layers."""

from __future__ import annotations

import inspect
from dataclasses import astuple, dataclass
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hw3.modeling.cache_argument import CACHE_ARGUMENT


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of a decoder layer, for estimates of memory.

    Attributes:
        hidden_size: size of a hidden state.
        intermediate_size: size of the MLP's inner state.
        heads: number of query heads.
        key_value_heads: number of key/value heads.
        head_dim: size of a head.
    """

    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Any) -> LayerShape:
        """Return the shape from a configuration; if layers differ, the largest of each size."""
        text = config.get_text_config()
        layers = text.per_layer_config if text.is_heterogeneous else [text]
        shapes = [cls._from_layer_config(layer) for layer in layers]
        return cls(*(max(sizes) for sizes in zip(*map(astuple, shapes), strict=True)))

    @classmethod
    def _from_layer_config(cls, config: Any) -> LayerShape:
        # GPT-2 and GPT-J: n_inner; OPT: ffn_dim; Falcon: ffn_hidden_size. Others without a key have 4 times the size.
        names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
        inner = next((size for name in names if (size := getattr(config, name, None))), 4 * config.hidden_size)
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=max(inner) if isinstance(inner, list) else inner,
            heads=heads,
            key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


def find_architecture_problem(config: Any) -> str | None:
    """Return why models of this configuration cannot be used; None if they can."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        return "is not a causal language model; use a decoder-only model"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "reads a text in both directions; use a decoder-only model"
    text = config.get_text_config()
    if text is not config:
        return f"takes more than text; use a model of text only, such as one of type {text.model_type}"
    pad = getattr(text, "pad_token_id", None)
    if pad is not None and pad >= text.vocab_size:
        return f"has pad_token_id {pad} in its configuration, but embeddings for ids 0 to {text.vocab_size - 1} only"
    if not hasattr(text, "num_hidden_layers"):
        return "has no single stack of decoder layers; use another model"
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    inputs = inspect.signature(model_class.forward).parameters
    layers = DynamicCache(config=config).layers if CACHE_ARGUMENT in inputs else []
    if not layers or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return "has layers without attention; use a model that has a key/value cache in every layer"
    return None
