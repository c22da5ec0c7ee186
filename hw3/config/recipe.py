"""Read, override, validate and print recipes. All problems are reported together, each with its location."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hw3.common.errors import ProblemCollector, UserError
from hw3.config.data_files import read_data_files
from hw3.config.schema import (
    REQUIRED_SECTIONS,
    SECTION_SCHEMAS,
    SPEEDS,
    DataSection,
    EvaluationSection,
    GenerationSection,
    ModelSection,
    QuantizationSection,
)
from hw3.config.validation import check_divisible, describe_value, find_conflicts, suggest_name, validate_section
from hw3.config.yaml_loader import KeyPath, YamlDocument, dump_yaml, read_yaml
from hw3.data.prompt import Prompt

PROMPTS_DIR = Path("recipes/prompts")
DEFAULT_SEED = 42  # of transformers
ALL_PROMPTS = "all"  # the name of all files in `PROMPTS_DIR`


@dataclass(frozen=True)
class Recipe:
    """A valid recipe.

    Attributes:
        name: `<folder>-<stem>` of the recipe file, which is the name of its default run folder.
        model: keyword arguments of `AutoModelForCausalLM.from_pretrained`.
        quantization: keyword arguments of `BitsAndBytesConfig`; None if the base model is not quantized.
        lora: keyword arguments of `LoraConfig`, as written; None for full fine-tuning.
        prompt: how an instruction becomes a prompt.
        data: data files and the length policy.
        training: keyword arguments of `SFTConfig`, as written.
        speed: `auto`, `plain` or `lean`.
        generation: keyword arguments of `GenerationConfig`.
        evaluation: how checkpoints are scored.
        document: the recipe as it was read, for the locations in messages.
    """

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
    document: YamlDocument = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the sections as plain values in their order, with the defaults of the project's own sections."""
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
        """Return the recipe as YAML, from which `load_recipe` reads an equal recipe."""
        return dump_yaml(self.to_dict())

    def problem(self, key_path: KeyPath, message: str) -> str:
        """Return a message about a key that begins with its file and line, or "command line", and its name."""
        return self.document.problem(key_path, message)

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step, for every number of processes."""
        return self.training.get("per_device_train_batch_size", 8) * self.training.get("gradient_accumulation_steps", 1)

    @property
    def seed(self) -> int:
        """Seed of the row order and of the adapter's initial weights."""
        return _get_seed(self.training)


def _get_seed(training: Any) -> int:
    """Return the seed of a `training` section, which need not be valid."""
    seed = training.get("seed", DEFAULT_SEED) if isinstance(training, dict) else DEFAULT_SEED
    return seed if isinstance(seed, int) else DEFAULT_SEED


def load_recipe(
    path: Path, overrides: list[str] | None = None, *, check_data_files: bool = False, processes: int = 1
) -> Recipe:
    """Read a recipe file, apply `section.key=value` overrides, and validate the result.

    Args:
        path: the YAML file.
        overrides: assignments from the command line, applied in order.
        check_data_files: whether to check the recipe's data files as well.
        processes: number of processes that share the rows of a step.

    Raises:
        UserError: the recipe is invalid. Every problem is reported, with its file and line (or "command line"), its
            key, and what was expected.
    """
    document = read_yaml(path)
    found = ProblemCollector(document.problems)
    problems = found.problems
    _insert_prompt_file(document, problems)
    for assignment in overrides or []:
        try:
            document.override(assignment)
            if assignment.partition("=")[0].strip() == "prompt":
                _insert_prompt_file(document, problems)
        except UserError as error:
            problems += error.problems
    sections = _validate_sections(document, problems)
    if "training" in sections:
        found.collect(check_divisible, document.values["training"], processes)
    if check_data_files and "data" in sections:
        found.collect(read_data_files, document, sections["data"], _get_seed(document.values.get("training")))
    found.raise_problems()
    return Recipe(
        name=f"{path.resolve().parent.name}-{path.stem}",
        model=sections["model"],
        quantization=sections.get("quantization"),
        # The values as written: strict validation converts nothing, and `save_steps: 20` stays a whole number.
        lora=document.values.get("lora"),
        prompt=sections["prompt"],
        data=sections["data"],
        training=document.values["training"],
        speed=document.values.get("speed", "auto"),
        generation=sections.get("generation") or GenerationSection(),
        evaluation=sections.get("evaluation") or EvaluationSection(),
        document=document,
    )


def load_prompt(path: Path) -> Prompt:
    """Read a prompt file, whose top level has the keys of a recipe's `prompt` section.

    Raises:
        UserError: the file cannot be read, or a key is wrong.
    """
    document = read_yaml(path)
    if document.problems:
        raise UserError(*document.problems)
    return validate_section(document, Prompt, document.values, ())


def check_generation_overrides(overrides: list[str]) -> None:
    """Check that assignments for an existing run change its `generation` section only.

    Raises:
        UserError: one of them changes another section.
    """
    other_sections = [text for text in overrides if not text.strip().startswith("generation.")]
    if other_sections:
        raise UserError(
            f"{other_sections[0]}: only generation.key=value may be set here; the run's recipe fixes the rest"
        )


def find_prompt_file(sha256: str) -> tuple[Path, Prompt] | None:
    """Return the file of `recipes/prompts/` whose prompt has this hash, and the prompt; None if there is none."""
    for file in sorted(PROMPTS_DIR.glob("*.yaml")):
        with contextlib.suppress(UserError):  # an invalid file cannot be the prompt that is searched for
            prompt = load_prompt(file)
            if prompt.sha256 == sha256:
                return file, prompt
    return None


def list_prompt_files(name: str) -> list[Path]:
    """Return the prompt files that a name on the command line stands for.

    Args:
        name: name of a file in `recipes/prompts/` without its suffix, `all` for all of these files, or any other path.

    Raises:
        UserError: it is not a path, and there is no such file in `recipes/prompts/` of the working directory.
    """
    stored = {file.stem: file for file in sorted(PROMPTS_DIR.glob("*.yaml"))}
    if name in stored:
        return [stored[name]]
    if Path(name).suffix in (".yaml", ".yml") or Path(name).name != name or Path(name).is_file():
        return [Path(name)]
    if not stored:
        raise UserError(f"--prompt {name}: there is no folder {PROMPTS_DIR}/ here; give the path of a file")
    if name == ALL_PROMPTS:
        return list(stored.values())
    raise UserError(f"--prompt {name}: no such prompt in {PROMPTS_DIR}/{suggest_name(name, [*stored, ALL_PROMPTS])}")


def _find_prompt(file_name: str, recipe_path: Path) -> Path:
    """Return the path of a prompt file that a recipe names.

    A relative path is searched from the working directory. If there is no such file, it is searched from the recipe's
    folder and the folders above, so that a recipe can be read from another folder.
    """
    if not Path(file_name).exists():
        for folder in recipe_path.resolve().parents:
            if (folder / file_name).is_file():
                return folder / file_name
    return Path(file_name)


def _insert_prompt_file(document: YamlDocument, problems: list[str]) -> None:
    """Replace `prompt: recipes/prompts/study.yaml` by the content of that file; append what is wrong to `problems`."""
    file_name = document.values.get("prompt")
    if not isinstance(file_name, str):
        return
    try:
        prompt = read_yaml(_find_prompt(file_name, Path(document.path)))
    except UserError as error:
        problems += [document.problem(("prompt",), problem) for problem in error.problems]
        document.values["prompt"] = None
        return
    problems += prompt.problems
    document.values["prompt"] = prompt.values
    locations = {("prompt", *key_path): location for key_path, location in prompt.locations.items() if key_path}
    document.locations |= locations


def _validate_sections(document: YamlDocument, problems: list[str]) -> dict[str, Any]:
    """Return the valid sections by name; append what is wrong with the others to `problems`."""
    known = [*SECTION_SCHEMAS, "speed"]
    for key in document.values:
        if key not in known:
            problems.append(document.problem((key,), f"no such section{suggest_name(key, known)}"))
    sections: dict[str, Any] = {}
    for section, schema in SECTION_SCHEMAS.items():
        values = document.values.get(section)
        if values is not None:
            try:
                sections[section] = validate_section(document, schema, values, (section,))
            except UserError as error:
                problems += error.problems
        elif section in REQUIRED_SECTIONS and section not in document.values:
            problems.append(f"{document.path}: {section}: the section is missing")
        # A prompt file that cannot be read leaves an empty section, and has been reported.
        elif section in REQUIRED_SECTIONS and not (section == "prompt" and problems):
            problems.append(document.problem((section,), "the section is empty"))
    speed = document.values.get("speed", "auto")
    if speed not in SPEEDS:
        problems.append(document.problem(("speed",), f"{describe_value(speed)}, expected one of {', '.join(SPEEDS)}"))
    problems += find_conflicts(document, sections)
    return sections
