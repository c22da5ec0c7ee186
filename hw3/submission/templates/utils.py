"""The prompt and quantization that the adapter was trained with. The grader imports both functions."""

from __future__ import annotations

from transformers import BitsAndBytesConfig

# The prompt is BEFORE + turn + AFTER, without BOS.
BEFORE = ""
TURN = "{instruction}"
AFTER = ""
# A chat template strips white space around the turn. Its special tokens are part of BEFORE and AFTER as text.
CHAT_TEMPLATE = False
# Arguments of BitsAndBytesConfig; None: the base model is not quantized.
QUANTIZATION = {"load_in_4bit": True}


def get_prompt(instruction: str) -> str:
    """Return the text that the model reads before its output."""
    turn = TURN.replace("{instruction}", instruction)
    return BEFORE + (turn.strip() if CHAT_TEMPLATE else turn) + AFTER


def get_bnb_config() -> BitsAndBytesConfig | None:
    """Return how the base model is quantized in training, scoring and generation."""
    return None if QUANTIZATION is None else BitsAndBytesConfig(**QUANTIZATION)
