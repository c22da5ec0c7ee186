"""Fill the constants of the template files of a submission."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hw3.config.recipe import Recipe
from hw3.data.tokenization import Encoder
from hw3.generation.generator import RunGenerator
from hw3.modeling.loading import resolve_attn_implementation

TEMPLATES_DIR = Path(__file__).parent / "templates"
_GRADER_PYTHON = (3, 10)


def build_utils_constants(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the constants of `utils.py`: the recipe's prompt and quantization."""
    before, after = Encoder(tokenizer, recipe.prompt).turn_prefix_and_suffix()
    quantization = recipe.quantization
    if quantization is not None:
        dtype = _portable_dtype(quantization.bnb_4bit_compute_dtype)
        quantization = quantization.model_copy(update={"bnb_4bit_compute_dtype": dtype})
    return {
        "BEFORE": before,
        "TURN": recipe.prompt.turn,
        "AFTER": after,
        "CHAT_TEMPLATE": recipe.prompt.chat_template,
        "QUANTIZATION": None if quantization is None else quantization.model_dump(),
    }


def _portable_dtype(dtype: str) -> str:
    """Return float32 in place of float16, which overflows without this project; every GPU has float32."""
    return "float32" if dtype == "float16" else dtype


def build_predict_constants(generator: RunGenerator) -> dict[str, Any]:
    """Return the constants of `predict.py`, with which it generates the same outputs as `generator`.

    Raises:
        UserError: the training rows, which limit the lengths of outputs, are missing.
    """
    model, generation = generator.recipe.model, generator.recipe.generation
    constants = {
        "DTYPE": _portable_dtype(model.dtype),
        "ATTENTION": resolve_attn_implementation(model),
        "GENERATION": generation.model_dump(exclude_none=True, exclude={"max_new_tokens"}),
        "STOPS": generator.generation_config.eos_token_id,
        "MAX_NEW_TOKENS": generation.max_new_tokens,
    }
    if generation.max_new_tokens is None:
        constants["LONGEST"] = generator.length_limits.breakpoints
    return constants


def fill_python_template(name: str, values: dict[str, Any]) -> str:
    """Return a Python template with its constants set.

    Args:
        name: file name in `templates/`.
        values: value by constant. Each constant is assigned on one line at the top level of the file.
    """
    text = _fill_template(name, r"{} = .*", {key: f"{key} = {_python_literal(value)}" for key, value in values.items()})
    ast.parse(text, feature_version=_GRADER_PYTHON)
    return text


def fill_shell_template(name: str, values: dict[str, str]) -> str:
    """Return a shell template with its variables set.

    Args:
        name: file name in `templates/`.
        values: value by variable.
    """
    return _fill_template(name, r"{}=.*", {key: f"{key}={shlex.quote(value)}" for key, value in values.items()})


def _fill_template(name: str, line_pattern: str, lines: dict[str, str]) -> str:
    """Replace one line per key; `line_pattern` is a regular expression with `{}` in place of the key."""
    text = (TEMPLATES_DIR / name).read_text(encoding="utf-8")
    for key, line in lines.items():
        pattern = f"^{line_pattern.format(key)}$"
        text, count = re.subn(pattern, line.replace("\\", r"\\"), text, flags=re.MULTILINE)
        assert count == 1, f"{name}: {count} lines set {key}"
    return text


def _python_literal(value: Any) -> str:
    """Return a value as Python source, with text in double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_python_literal(key)}: {_python_literal(item)}" for key, item in value.items()) + "}"
    # The escapes of JSON strings are also Python's.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
