"""Types of the fields of `SFTConfig` and `LoraConfig`, from a table.

Importing TRL and PEFT takes seconds of CPU time. With the table, a mistake in a recipe is reported without them.
`python tools/write_library_fields.py` writes the table from the installed libraries.
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("library_fields.json")


class LibraryObject:
    """The table's name for every class of a library, such as PEFT's `EvaConfig`. No YAML value is an instance."""


def load_field_types(class_name: str) -> dict[str, Any]:
    """Return the annotation of each field of a library's configuration class, in the order of the class.

    Args:
        class_name: `SFTConfig` or `LoraConfig`.
    """
    fields = json.loads(TABLE.read_text(encoding="utf-8"))[class_name]
    names = {"Any": Any, "Literal": typing.Literal, "LibraryObject": LibraryObject}
    return typing.get_type_hints(type(class_name, (), {"__annotations__": fields}), localns=names)
