"""Read, override, check and print a recipe. Every problem is reported at once, each with its place."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hw3.common.errors import UserError
from hw3.config.schema import (
    REQUIRED_SECTIONS,
    SECTIONS,
    SPEEDS,
    DataSection,
    EvaluationSection,
    GenerationSection,
    ModelSection,
    QuantizationSection,
)
from hw3.config.validation import check_combinations, check_section, nearest_name, show_value
from hw3.config.yaml_loader import Source, dump_yaml, read_yaml
from hw3.data.prompt import Prompt

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
    prompt = check_section(source, Prompt, source.values, (), problems)
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
            problems.append(f"{source.place((key,))}: {key}: no such section{nearest_name(key, known)}")
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
        built[section] = check_section(source, schema, values, (section,), problems)
        if len(problems) > before:
            broken.add(section)
    speed = source.values.get("speed", "auto")
    if speed not in SPEEDS:
        problems.append(f"{source.place(('speed',))}: speed: {show_value(speed)}: one of {', '.join(SPEEDS)} is needed")
    sound = {section: value for section, value in built.items() if section not in broken}
    check_combinations(source, sound, problems)
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
