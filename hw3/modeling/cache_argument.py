"""The name under which models and `generate` take a key/value cache."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin

# transformers 5.24 renames `past_key_values` to `cache` in all models at once, and removes the old name in 5.40.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
