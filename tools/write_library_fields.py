"""Write the table of fields of the installed TRL and PEFT, against which recipes are checked.

    python tools/write_library_fields.py

Run it after an update of TRL, transformers or PEFT.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import Enum
from importlib.metadata import version
from typing import Any, Literal

from peft import LoraConfig
from trl import SFTConfig

from hw3.config.library_fields import TABLE

CONFIG_CLASSES = (SFTConfig, LoraConfig)
BUILT_IN_TYPES = (bool, int, float, str, dict, list, tuple)


def list_fields(config_class: type) -> dict[str, str]:
    """Return the annotation of each field of a dataclass as text."""
    hints = typing.get_type_hints(config_class)
    return {field.name: format_type(hints[field.name]) for field in dataclasses.fields(config_class) if field.init}


def format_type(annotation: Any) -> str:
    """Return an annotation as text, with `Literal` in place of an enumeration and `LibraryObject` of other classes."""
    if _is_enum(annotation):
        return _format_literal([str(member.value) for member in annotation])
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        # Libraries annotate fields with `Enum | str`, which would accept every text.
        has_enum = any(map(_is_enum, arguments))
        parts = {format_type(part) for part in arguments if not (has_enum and part is str)}
        # Sorted, because `typing` may return an equal union of another order. `None` is last.
        return " | ".join(sorted(parts, key=lambda part: (part == "None", part)))
    return _format_plain_type(annotation)


def _format_plain_type(annotation: Any) -> str:
    """Return an annotation as text. An enumeration inside a list accepts only its members, which YAML cannot hold."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return _format_literal(arguments)
    if origin in BUILT_IN_TYPES:
        return f"{origin.__name__}[{', '.join(map(_format_plain_type, arguments))}]"
    if annotation is types.NoneType:
        return "None"
    return annotation.__name__ if annotation is Any or annotation in BUILT_IN_TYPES else "LibraryObject"


def _format_literal(values: typing.Iterable[Any]) -> str:
    return f"Literal[{', '.join(map(repr, values))}]"


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)


def main() -> None:
    """Write the table."""
    table: dict[str, dict[str, str]] = {"versions": {name: version(name) for name in ("trl", "transformers", "peft")}}
    table |= {config_class.__name__: list_fields(config_class) for config_class in CONFIG_CLASSES}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{TABLE}: {', '.join(f'{len(fields)} of {name}' for name, fields in table.items() if name != 'versions')}")


if __name__ == "__main__":
    main()
