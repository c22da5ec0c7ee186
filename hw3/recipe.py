"""Read, override, check and print a recipe. Every problem is reported at once, each with its place."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hw3.errors import UserError
from hw3.prompt import Prompt
from hw3.schema import (
    DECIDED_TRAINING_KEYS,
    REQUIRED_SECTIONS,
    SECTIONS,
    SPEEDS,
    DataSection,
    EvaluationSection,
    GenerationSection,
    ModelSection,
    QuantizationSection,
)
from hw3.yaml_source import KeyPath, Source, read_yaml, reads_as_text

PROMPTS = Path("recipes/prompts")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `lora` and `training` hold the keys given, ready for `LoraConfig` and `SFTConfig`."""

    name: str
    model: ModelSection
    quantization: QuantizationSection | None
    lora: dict[str, Any] | None
    prompt: Prompt
    data: DataSection
    training: dict[str, Any]
    speed: str
    generation: GenerationSection
    evaluation: EvaluationSection

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the sections, keys with their defaults filled in."""
        values: dict[str, Any] = {"model": self.model.model_dump()}
        if self.quantization is not None:
            values["quantization"] = self.quantization.model_dump()
        if self.lora is not None:
            values["lora"] = self.lora
        values |= {
            "prompt": self.prompt.model_dump(),
            "data": self.data.model_dump(),
            "training": self.training,
            "speed": self.speed,
            "generation": self.generation.model_dump(exclude_none=True),
            "evaluation": self.evaluation.model_dump(exclude_none=True),
        }
        return values

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return dump_yaml(self.to_dict())

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step sees, whatever the number of processes."""
        return self.training.get("per_device_train_batch_size", 8) * self.training.get("gradient_accumulation_steps", 1)

    @property
    def seed(self) -> int:
        """Seed of the row order and of the adapter's initial weights."""
        return self.training.get("seed", 42)


class _Dumper(yaml.SafeDumper):
    """Writes multi-line text readably."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what YAML 1.1 would misread; `1e5` is a number in 1.2 alone.
    quoted = "\n" in text or not reads_as_text(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML as this project writes it: keys in order, one line a text."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**6)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `section.key=value` overrides, and check it.

    Args:
        path: the YAML file. Its name for messages and run folders is `<folder>-<stem>`.
        overrides: assignments from the command line, applied in order.

    Raises:
        UserError: every problem found, each with file and line (or "command line"), key, and what would be right.
    """
    source = read_yaml(path)
    problems = list(source.problems)
    _inline_prompt_file(source, problems)
    for assignment in overrides or []:
        try:
            source.override(assignment)
            if assignment.partition("=")[0].strip() == "prompt":
                _inline_prompt_file(source, problems)
        except UserError as error:
            problems += error.problems
    return _check(source, f"{path.resolve().parent.name}-{path.stem}", problems)


def prompt_file(sha256: str) -> tuple[Path, Prompt] | None:
    """The file of `recipes/prompts/` whose prompt has this hash; None where there is none."""
    for file in sorted(PROMPTS.glob("*.yaml")):
        with contextlib.suppress(UserError):  # a broken prompt file is not this run's business
            prompt = load_prompt(file)
            if prompt.sha256 == sha256:
                return file, prompt
    return None


def load_prompt(path: Path) -> Prompt:
    """Read a prompt file: the keys of a recipe's `prompt` section at its top level.

    Raises:
        UserError: the file or a key is wrong.
    """
    source = read_yaml(path)
    problems = list(source.problems)
    prompt = _section(source, Prompt, source.values, (), problems)
    if problems or prompt is None:
        raise UserError(*problems)
    return prompt


def _inline_prompt_file(source: Source, problems: list[str]) -> None:
    """`prompt: recipes/prompts/study.yaml` stands for that file's content."""
    name = source.values.get("prompt")
    if not isinstance(name, str):
        return
    place = source.place(("prompt",))
    try:
        prompt = read_yaml(Path(name))
    except UserError as error:
        problems += [f"{place}: prompt: {problem}" for problem in error.problems]
        source.values["prompt"] = None
        return
    problems += prompt.problems
    source.values["prompt"] = prompt.values
    source.places |= {("prompt", *path): place for path, place in prompt.places.items() if path}


def _check(source: Source, name: str, problems: list[str]) -> Recipe:
    known = [*SECTIONS, "speed"]
    for key in source.values:
        if key not in known:
            problems.append(f"{source.place((key,))}: {key}: no such section{_nearest(key, known)}")
    built: dict[str, Any] = {}
    broken = set()
    for section, schema in SECTIONS.items():
        values = source.values.get(section)
        if values is None:
            if section in REQUIRED_SECTIONS and section not in source.values:
                problems.append(f"{source.name}: {section}: the section is missing")
            elif section in REQUIRED_SECTIONS and not (section == "prompt" and problems):
                problems.append(f"{source.place((section,))}: {section}: the section is empty")
            continue
        before = len(problems)
        built[section] = _section(source, schema, values, (section,), problems)
        if len(problems) > before:
            broken.add(section)
    speed = source.values.get("speed", "auto")
    if speed not in SPEEDS:
        problems.append(f"{source.place(('speed',))}: speed: {_shown(speed)}: one of {', '.join(SPEEDS)} is needed")
    sound = {section: value for section, value in built.items() if section not in broken}
    _check_combinations(source, sound, problems)
    if problems:
        raise UserError(*problems)
    return Recipe(
        name=name,
        model=built["model"],
        quantization=built.get("quantization"),
        # The values as written: strict sections convert nothing, and `save_steps: 20` stays a whole number.
        lora=source.values.get("lora"),
        prompt=built["prompt"],
        data=built["data"],
        training=source.values["training"],
        speed=speed,
        generation=built.get("generation") or GenerationSection(),
        evaluation=built.get("evaluation") or EvaluationSection(),
    )


def _section(
    source: Source, schema: type[BaseModel], values: Any, path: KeyPath, problems: list[str]
) -> BaseModel | None:
    name = ".".join(map(str, path)) or "the file"
    if not isinstance(values, dict):
        problems.append(f"{source.place(path)}: {name}: {_shown(values)}: lines of `key: value` are needed")
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
            found.append(f"{place}: {name}: no such key{_nearest(str(keys[-1]), known)}")
        else:
            wanted = list(dict.fromkeys(_wanted(detail) for detail in details))
            found.append(f"{place}: {name}: {_shown(first['input'])}: {' or '.join(wanted)}")
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


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}" if len(known) <= 12 else ""


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"found {text if len(text) <= 60 else text[:57] + '...'}"


def is_gemma2(model: ModelSection) -> bool:
    """Whether the base is Gemma-2, from a local `config.json` or the name; nothing is fetched."""
    config = Path(model.pretrained_model_name_or_path) / "config.json"
    if config.is_file():
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "gemma2"
    return re.search(r"gemma-?2\b", model.pretrained_model_name_or_path, re.IGNORECASE) is not None


def _check_combinations(source: Source, sections: dict[str, Any], problems: list[str]) -> None:
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


@dataclass(frozen=True, slots=True)
class StepLayout:
    """How one optimizer step's rows are shared out."""

    processes: int
    rows_per_device: int
    accumulation: int


def step_layout(recipe: Recipe, processes: int) -> StepLayout:
    """Share a step's rows among processes: they take over accumulation first, then rows.

    Raises:
        UserError: there is no process, or the rows do not divide; names the nearest numbers of processes that do.
    """
    if processes < 1:
        raise UserError(f"{processes} processes: 1 or more are needed")
    rows = recipe.training.get("per_device_train_batch_size", 8)
    accumulation = recipe.training.get("gradient_accumulation_steps", 1)
    total = rows * accumulation
    if total % processes:
        fitting = [number for number in range(1, total + 1) if total % number == 0]
        below = max(number for number in fitting if number < processes)
        above = min((number for number in fitting if number > processes), default=None)
        nearest = f"{below}" if above is None else f"{below} or {above}"
        rows_that_divide = sorted({max(total // processes, 1) * processes, -(-total // processes) * processes})
        raise UserError(
            f"training: {total} rows a step (per_device_train_batch_size {rows} x gradient_accumulation_steps "
            f"{accumulation}) do not divide among {processes} processes; use {nearest} processes, "
            f"or {' or '.join(map(str, rows_that_divide))} rows a step"
        )
    shared = math.gcd(accumulation, processes)
    return StepLayout(processes, rows // (processes // shared), accumulation // shared)
