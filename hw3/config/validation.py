"""Check a recipe's sections and their combinations; every message names file, line and key."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hw3.config.schema import DECIDED_TRAINING_KEYS, ModelSection
from hw3.config.yaml_loader import KeyPath, Source


def check_section(
    source: Source, schema: type[BaseModel], values: Any, path: KeyPath, problems: list[str]
) -> BaseModel | None:
    name = ".".join(map(str, path)) or "the file"
    if not isinstance(values, dict):
        problems.append(f"{source.place(path)}: {name}: {show_value(values)}: lines of `key: value` are needed")
        return None
    if path == ("training",):
        for key in list(values):
            instead = DECIDED_TRAINING_KEYS.get(key)
            if instead is None and key.startswith(("eval_", "per_device_eval")):
                instead = "checkpoints are scored apart from training, by `make eval`"
            if instead is not None:
                problems.append(f"{source.place((*path, key))}: training.{key}: decided by the project: {instead}")
        values = {key: value for key, value in values.items() if key not in DECIDED_TRAINING_KEYS}
        values = {key: value for key, value in values.items() if not key.startswith(("eval_", "per_device_eval"))}
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems += _messages(source, schema, path, error)
        return None


def _messages(source: Source, schema: type[BaseModel], path: KeyPath, error: ValidationError) -> list[str]:
    """One message a key: a union's several complaints are about one value."""
    by_key: dict[KeyPath, list[Any]] = {}
    for detail in error.errors():
        keys = tuple(part for part in detail["loc"] if (*path, part) in source.places or isinstance(part, int))
        if detail["type"] in ("missing", "extra_forbidden"):
            keys = tuple(detail["loc"])
        by_key.setdefault(keys or tuple(detail["loc"][:1]), []).append(detail)
    found = []
    for keys, details in by_key.items():
        place, name, first = source.place((*path, *keys)), ".".join(map(str, (*path, *keys))), details[0]
        if first["type"] == "missing":
            found.append(f"{place}: {name}: the key is missing")
        elif first["type"] == "extra_forbidden":
            known = [*schema.model_fields, *(DECIDED_TRAINING_KEYS if path == ("training",) else ())]
            found.append(f"{place}: {name}: no such key{nearest_name(str(keys[-1]), known)}")
        else:
            wanted = list(dict.fromkeys(_wanted(detail) for detail in details))
            found.append(f"{place}: {name}: {show_value(first['input'])}: {' or '.join(wanted)}")
    return found


def _wanted(detail: Any) -> str:
    context = detail.get("ctx", {})
    plain = {
        "int_type": "a whole number is needed",
        "int_from_float": "a whole number is needed",
        "float_type": "a number is needed",
        "bool_type": "true or false is needed",
        "string_type": "text is needed",
        "list_type": "a list is needed",
        "dict_type": "lines of `key: value` are needed",
        "none_required": "null",
        "string_too_short": "text is needed, this is empty",
    }
    if detail["type"] in plain:
        return plain[detail["type"]]
    if detail["type"] == "literal_error":
        expected = re.findall(r"'([^']*)'|(True|False)", context["expected"])
        words = [word or flag.lower() for word, flag in expected]
        near = difflib.get_close_matches(str(detail["input"]), words, n=1)
        return (f"did you mean {near[0]}? " if near else "") + f"one of {', '.join(words)} is needed"
    if detail["msg"].startswith("Input should be "):
        return f"a number {detail['msg'].removeprefix('Input should be ')} is needed"
    return detail["msg"].removeprefix("Value error, ")


def nearest_name(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}" if len(known) <= 12 else ""


def show_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"found {text if len(text) <= 60 else text[:57] + '...'}"


def is_gemma2(model: ModelSection) -> bool:
    """Whether the base is Gemma-2, from a local `config.json` or the name; nothing is fetched."""
    config = Path(model.pretrained_model_name_or_path) / "config.json"
    if config.is_file():
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "gemma2"
    return re.search(r"gemma-?2\b", model.pretrained_model_name_or_path, re.IGNORECASE) is not None


def check_combinations(source: Source, sections: dict[str, Any], problems: list[str]) -> None:
    """Combinations that cannot work, found without loading anything."""
    model, lora, training = sections.get("model"), sections.get("lora"), sections.get("training")
    if model is not None and model.attn_implementation == "sdpa" and is_gemma2(model):
        problems.append(
            f"{source.place(('model', 'attn_implementation'))}: model.attn_implementation: found sdpa: Gemma-2 caps "
            "its attention scores, which sdpa cannot; use eager"
        )
    if sections.get("quantization") is not None and "lora" in source.values and source.values["lora"] is None:
        place = source.place(("lora",))
        problems.append(f"{place}: lora: 4-bit weights cannot be trained; add a lora section or set quantization=null")
    elif sections.get("quantization") is not None and "lora" not in source.values:
        place = source.place(("quantization",))
        problems.append(f"{place}: quantization: 4-bit weights cannot be trained; add a lora section or drop this one")
    if lora is not None:
        if lora.init_lora_weights not in (None, True, False, "gaussian", "orthogonal"):
            problems.append(
                f"{source.place(('lora', 'init_lora_weights'))}: lora.init_lora_weights: found "
                f"{lora.init_lora_weights}: it changes the base's weights, which a checkpoint does not hold; use true, "
                "false, gaussian or orthogonal"
            )
        for key in ("target_modules", "modules_to_save", "target_parameters"):
            names = getattr(lora, key)
            if names is not None and names != "all-linear" and _touches_head(names):
                problems.append(
                    f"{source.place(('lora', key))}: lora.{key}: found lm_head: the loss reads its weight directly, so "
                    "an adapter there would never be trained; leave it out"
                )
    if training is not None:
        if training.bf16 and training.fp16:
            problems.append(f"{source.place(('training', 'fp16'))}: training.fp16: bf16 and fp16 cannot both be true")
        if training.max_steps is not None and training.max_steps < 1 and training.max_steps != -1:
            place = source.place(("training", "max_steps"))
            problems.append(
                f"{place}: training.max_steps: found {training.max_steps}: 1 or more is needed, or -1 for epochs"
            )
        elif training.max_steps in (None, -1) and training.num_train_epochs is None:
            problems.append(f"{source.place(('training',))}: training: give max_steps or num_train_epochs")


def _touches_head(names: str | list[str]) -> bool:
    if isinstance(names, str):
        try:
            return re.fullmatch(names, "lm_head") is not None
        except re.error:
            return False
    return any(name == "lm_head" or name.endswith(".lm_head") for name in names)
