"""What scores and predictions depend on, by content, and the keys that are derived from it.

Scores and predictions are reused as long as their key stays the same: nothing that would change a figure may change
without changing the key.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from hw3.config.recipe import find_prompt_file
from hw3.data.prompt import Example, Prompt

# Raised when scores that an earlier version of this project wrote may be wrong. Version 1 scored adapters that change
# the base's weights (PiSSA, biases, saved embeddings), and those after them, with the weights of both.
SCORING_VERSION = 2


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Everything about the base model and its arithmetic that a score depends on. Checkpoint and prompt come on top.

    Attributes:
        base: hash of the base model.
        tokenizer: hash of the tokenizer.
        dtype: compute dtype.
        attn_implementation: attention, as the recipe names it.
        quantization: the recipe's `quantization` section; None without.
        dequantized: whether 4-bit weights are dequantized once after loading.
    """

    base: str
    tokenizer: str
    dtype: str
    attn_implementation: str | None
    quantization: dict[str, Any] | None
    dequantized: bool

    def key(self, adapter_sha256: str | None, prompt: Prompt, examples: list[Example], **more: Any) -> str:
        """Return 16 hex digits that identify a result: same content, same key.

        Args:
            adapter_sha256: hash of the checkpoint; None for the base model.
            prompt: the prompt.
            examples: the few-shot examples that are shown in it.
            more: JSON values of everything else that the result depends on.
        """
        content = {
            **asdict(self),
            "adapter": adapter_sha256,
            "prompt": prompt.model_dump(exclude={"examples"}),
            "examples": [example.model_dump() for example in examples],
            **more,
        }
        if adapter_sha256 is not None:  # no version scored base models wrongly
            content["scoring_version"] = SCORING_VERSION
        text = json.dumps(content, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_name(prompt: Prompt) -> str:
    """Return the name of the file in `recipes/prompts/` with this content; `recipe` if there is none."""
    found = find_prompt_file(prompt.sha256)
    return "recipe" if found is None else found[0].stem
