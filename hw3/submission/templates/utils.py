"""The prompt and the quantization that the adapter was trained with. The grader imports both functions."""

from __future__ import annotations

from transformers import BitsAndBytesConfig

# The prompt is BEFORE, the turn and AFTER; BOS is not part of it.
BEFORE = ""
TURN = "{instruction}"
AFTER = ""
# A chat template strips the turn at both ends, and its special tokens are spelled in BEFORE and AFTER.
CHAT_TEMPLATE = False
# None: the base is not quantized.
QUANTIZATION = {"load_in_4bit": True}


def get_prompt(instruction: str) -> str:
    """The text that the model sees before its answer."""
    turn = TURN.replace("{instruction}", instruction)
    return BEFORE + (turn.strip() if CHAT_TEMPLATE else turn) + AFTER


def get_bnb_config() -> BitsAndBytesConfig | None:
    """How the base is quantized, in training, scoring and generation alike."""
    return None if QUANTIZATION is None else BitsAndBytesConfig(**QUANTIZATION)
