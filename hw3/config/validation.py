"""Validate the sections of a recipe and their combinations. Every message names file, line and key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hw3.common.errors import UserError
from hw3.config.common_names import COMMON_NAMES
from hw3.config.schema import (
    EVALUATED_AFTER_TRAINING,
    RESERVED_TRAINING_KEYS,
    DataSection,
    EvaluationSection,
    ModelSection,
    is_evaluation_key,
)
from hw3.config.yaml_loader import KeyPath, YamlDocument

Section = TypeVar("Section", bound=BaseModel)

_MAX_PROCESSES = 10_000  # that are proposed in place of a number that does not divide a step's rows

# What was expected, by pydantic's error type.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "lines of `key: value`",
    "none_required": "null",
    "string_too_short": "text that is not empty",
    "finite_number": "a finite number",
    "is_instance_of": "an object that only Python code can build",
}


def validate_section(document: YamlDocument, schema: type[Section], values: Any, key_path: KeyPath) -> Section:
    """Return a section that is valid according to its schema.

    Args:
        document: the document that the values are from, for their locations.
        schema: the section's schema.
        values: the section's values.
        key_path: where the section stands in the document; empty for the whole document.

    Raises:
        UserError: the section is invalid; every problem of it is reported.
    """
    if not isinstance(values, dict):
        raise UserError(document.problem(key_path, f"{describe_value(values)}, expected lines of `key: value`"))
    problems: list[str] = []
    if key_path == ("training",):
        allowed = {}
        for key, value in values.items():
            alternative = RESERVED_TRAINING_KEYS.get(key) or (
                EVALUATED_AFTER_TRAINING if is_evaluation_key(key) else None
            )
            if alternative is None:
                allowed[key] = value
            else:
                problems.append(document.problem((*key_path, key), f"cannot be set in a recipe: {alternative}"))
        values = allowed
    try:
        section = schema.model_validate(values)
    except ValidationError as error:
        problems += _describe_errors(document, schema, key_path, error)
    if problems:
        raise UserError(*problems)
    return section


def _describe_errors(
    document: YamlDocument, schema: type[BaseModel], section_path: KeyPath, error: ValidationError
) -> list[str]:
    """Return one message per key; for a union, pydantic reports one error for each of its types."""
    errors_by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors():
        # Without the names of a union's types, which pydantic adds to the location.
        keys = tuple(
            part for part in detail["loc"] if (*section_path, part) in document.locations or isinstance(part, int)
        )
        if detail["type"] in ("missing", "extra_forbidden"):
            keys = tuple(detail["loc"])
        errors_by_key.setdefault(keys or tuple(detail["loc"][:1]), []).append(detail)
    messages = []
    for keys, details in errors_by_key.items():
        if details[0]["type"] == "missing":
            message = "the key is missing"
        elif details[0]["type"] == "extra_forbidden":
            known = [*schema.model_fields, *(RESERVED_TRAINING_KEYS if section_path == ("training",) else ())]
            aliases = COMMON_NAMES.get(str(section_path[0]), {}) if section_path else {}
            message = f"no such key{suggest_name(str(keys[-1]), known, aliases)}"
        else:
            expected = list(dict.fromkeys(_describe_expected(detail) for detail in details))
            message = f"{describe_value(details[0]['input'])}, expected {' or '.join(expected)}"
        messages.append(document.problem((*section_path, *keys), message))
    return messages


def _describe_expected(detail: ErrorDetails) -> str:
    """Return what pydantic expected in place of the value that it found."""
    if detail["type"] in _EXPECTED:
        return _EXPECTED[detail["type"]]
    if detail["type"] == "literal_error":
        literals = re.findall(r"'([^']*)'|(True|False)", detail["ctx"]["expected"])
        choices = [text or flag.lower() for text, flag in literals]
        nearest = difflib.get_close_matches(str(detail["input"]), choices, n=1)
        expected = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
        return expected + (f" (did you mean {nearest[0]}?)" if nearest else "")
    if detail["type"].startswith(("greater_than", "less_than")):
        return f"a number {detail['msg'].removeprefix('Input should be ')}"
    return detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ").removeprefix("expected ")


def suggest_name(name: str, known: list[str], aliases: Mapping[str, str] | None = None) -> str:
    """Return the end of a message about an unknown name: the nearest known one, or all if they are few.

    Args:
        name: the unknown name.
        known: the names that exist.
        aliases: the known name by the name that other tools give to it.
    """
    if aliases is not None and name in aliases:
        return f"; did you mean {aliases[name]}?"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return f"; there are {', '.join(known)}" if len(known) <= 16 else ""


def describe_value(value: Any) -> str:
    """Return "found" and a value as JSON, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"found {text if len(text) <= 60 else text[:57] + '...'}"


def is_gemma2(model: ModelSection) -> bool:
    """Return whether the base model is Gemma-2, by its local `config.json` or else its name; nothing is downloaded."""
    config = Path(model.pretrained_model_name_or_path) / "config.json"
    if config.is_file():
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "gemma2"
    return re.search(r"gemma-?2\b", model.pretrained_model_name_or_path, re.IGNORECASE) is not None


def find_conflicts(document: YamlDocument, sections: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each combination of values that cannot work; nothing is loaded.

    Args:
        document: the recipe, for locations.
        sections: the valid sections by name.
    """
    if model := sections.get("model"):
        yield from _find_attention_conflicts(document, model)
    if sections.get("quantization"):
        yield from _find_quantization_conflicts(document)
    if lora := sections.get("lora"):
        yield from _find_lora_conflicts(document, lora)
    if training := sections.get("training"):
        yield from _find_training_conflicts(document, training)
    if data := sections.get("data"):
        yield from _find_data_conflicts(document, data)
    if evaluation := sections.get("evaluation"):
        yield from _find_evaluation_conflicts(document, evaluation)


def _find_attention_conflicts(document: YamlDocument, model: ModelSection) -> Iterator[str]:
    if model.attn_implementation == "sdpa" and is_gemma2(model):
        yield document.problem(
            ("model", "attn_implementation"),
            "found sdpa, which cannot soft-cap attention scores as Gemma-2 does; use eager",
        )


def _find_quantization_conflicts(document: YamlDocument) -> Iterator[str]:
    if document.values.get("lora") is not None:
        return
    if "lora" in document.values:
        yield document.problem(
            ("lora",), "4-bit weights cannot be trained; add a lora section or set quantization=null"
        )
    else:
        yield document.problem(
            ("quantization",), "4-bit weights cannot be trained; add a lora section or remove this section"
        )


def _find_lora_conflicts(document: YamlDocument, lora: Any) -> Iterator[str]:
    if lora.init_lora_weights not in (None, True, False, "gaussian", "orthogonal"):
        yield document.problem(
            ("lora", "init_lora_weights"),
            f"found {lora.init_lora_weights}, which changes the base model's weights, but checkpoints contain only the "
            "adapter; use true, false, gaussian or orthogonal",
        )
    if lora.alora_invocation_tokens is not None:
        yield document.problem(
            ("lora", "alora_invocation_tokens"), "activated LoRA depends on the input and cannot be scored; remove it"
        )
    for key in ("target_modules", "modules_to_save", "target_parameters"):
        names = getattr(lora, key)
        if names is not None and names != "all-linear" and _matches_lm_head(names):
            yield document.problem(
                ("lora", key),
                "found lm_head, which would never be trained, because the loss reads its weight directly; remove it",
            )


def _find_training_conflicts(document: YamlDocument, training: Any) -> Iterator[str]:
    if training.bf16 and training.fp16:
        yield document.problem(("training", "fp16"), "bf16 and fp16 cannot both be true; set one of them to false")
    if training.max_steps is not None and training.max_steps < 1 and training.max_steps != -1:
        yield document.problem(
            ("training", "max_steps"),
            f"found {training.max_steps}, expected 1 or more, or -1 to count epochs",
        )
    elif training.max_steps in (None, -1) and training.num_train_epochs is None:
        yield document.problem(("training",), "set max_steps or num_train_epochs")


def _find_data_conflicts(document: YamlDocument, data: DataSection) -> Iterator[str]:
    if data.dev is not None and data.dev_fraction is not None:
        yield document.problem(
            ("data", "dev_fraction"),
            f"found {data.dev_fraction}, but data.dev names a file whose rows have this purpose; remove one of them",
        )


def _find_evaluation_conflicts(document: YamlDocument, evaluation: EvaluationSection) -> Iterator[str]:
    if evaluation.patience is not None and not evaluation.during_training:
        yield document.problem(
            ("evaluation", "patience"),
            f"found {evaluation.patience}, but checkpoints are scored after training only; set "
            "evaluation.during_training=true, or remove patience",
        )


def check_divisible(training: Mapping[str, Any], processes: int) -> None:
    """Check that processes can share the rows of an optimizer step equally.

    Args:
        training: the values of a valid `training` section.
        processes: number of processes.

    Raises:
        UserError: there is no process, or the rows cannot be divided; names the nearest numbers that work.
    """
    if processes < 1:
        raise UserError(f"found {processes} processes; expected 1 or more")
    rows = training.get("per_device_train_batch_size", 8)
    accumulation = training.get("gradient_accumulation_steps", 1)
    total = rows * accumulation
    if total % processes:
        divisors = [number for number in range(1, min(total, _MAX_PROCESSES) + 1) if total % number == 0]
        below = max(number for number in divisors if number < processes)
        above = min((number for number in divisors if number > processes), default=None)
        nearest = f"{below}" if above is None else f"{below} or {above}"
        divisible_rows = sorted({max(total // processes, 1) * processes, -(-total // processes) * processes})
        raise UserError(
            f"training: {total} rows per step (per_device_train_batch_size {rows} x gradient_accumulation_steps "
            f"{accumulation}) cannot be divided among {processes} processes; use {nearest} processes, "
            f"or {' or '.join(map(str, divisible_rows))} rows per step"
        )


def _matches_lm_head(names: str | list[str]) -> bool:
    """Return whether module names, or the regular expression that PEFT would read a single text as, match lm_head."""
    if isinstance(names, str):
        return re.fullmatch(names, "lm_head") is not None
    return any(name == "lm_head" or name.endswith(".lm_head") for name in names)
