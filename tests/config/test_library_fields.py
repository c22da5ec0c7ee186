"""The table of the libraries' fields agrees with the installed libraries."""

import json
import types
import typing
from enum import Enum
from typing import Any, Literal

import pytest
import write_library_fields
from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from transformers.training_args import trainer_log_levels
from trl import SFTConfig

from hw3.config.library_fields import TABLE, load_field_types
from hw3.config.schema import LoraSection, TrainingSection

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
# One value of each type that YAML has, also nested, and the names of every enumeration below.
SAMPLES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2.5,
    "",
    "text",
    [],
    ["a"],
    [1],
    [[1, 2]],
    {},
    {"a": 1},
    {"a": [1]},
    {"a": True},
]


@pytest.mark.parametrize("config_class", write_library_fields.CONFIG_CLASSES)
def test_table_agrees_with_the_installed_libraries(config_class: type) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))[config_class.__name__]
    assert table == write_library_fields.list_fields(config_class), "run: python tools/write_library_fields.py"


def enums_to_literals(annotation: Any) -> Any:
    """Return an annotation of a library with each enumeration replaced by its values, as recipes write them."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return Literal[tuple(str(member.value) for member in annotation)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = typing.get_args(annotation)
        if any(isinstance(part, type) and issubclass(part, Enum) for part in parts):
            parts = tuple(part for part in parts if part is not str)
        return typing.Union[tuple(enums_to_literals(part) for part in parts)]  # noqa: UP007  (built at run time)
    return annotation


def accepted(annotation: Any, samples: list[Any]) -> list[Any]:
    """Return the samples that a strict section with this annotation accepts."""
    model = create_model("Model", __config__=STRICT, field=(annotation, None))
    values = []
    for sample in samples:
        try:
            values.append(model.model_validate({"field": sample}).field)
        except ValidationError:
            values.append("REJECTED")
    return values


@pytest.mark.parametrize("config_class", [SFTConfig, LoraConfig])
def test_types_from_the_table_accept_what_the_dataclass_accepts(config_class: type) -> None:
    hints = typing.get_type_hints(config_class)
    field_types = load_field_types(config_class.__name__)
    assert list(field_types) == [name for name, field in config_class.__dataclass_fields__.items() if field.init]
    choices = [value for name in field_types for value in _literal_values(enums_to_literals(hints[name]))]
    samples = [*SAMPLES, *dict.fromkeys(choices)]
    for name, field_type in field_types.items():
        assert accepted(field_type, samples) == accepted(enums_to_literals(hints[name]), samples), name


def _literal_values(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in _literal_values(part)]


def test_log_levels_are_those_of_transformers() -> None:
    annotation = TrainingSection.model_fields["log_level"].annotation
    assert set(typing.get_args(annotation)) == set(trainer_log_levels)


def test_values_that_only_python_can_build_are_refused() -> None:
    with pytest.raises(ValidationError):
        LoraSection.model_validate({"eva_config": {"rho": 2.0}})
    assert TypeAdapter(load_field_types("LoraConfig")["loftq_config"], config=STRICT).validate_python({}) == {}
