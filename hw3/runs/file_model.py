"""The base class of the JSON files in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from hw3.common.atomic_io import write_atomically
from hw3.common.errors import UserError


class FileModel(BaseModel):
    """A JSON file, or a part of one. Unknown keys and wrong types are refused when it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, serialize_by_alias=True, validate_by_name=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a file.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: the file is not of this format; names the first key that is wrong.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{path}: {describe_validation_error(error)}; delete the file, and the command that wrote it writes it "
                "again"
            ) from error

    def to_json(self) -> str:
        """Return the file's text: indented JSON that ends with a newline."""
        return json.dumps(self.model_dump(), ensure_ascii=False, indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Replace a file atomically."""
        write_atomically(path, self.to_json())


def describe_validation_error(error: ValidationError) -> str:
    """Return the first problem of a file that cannot be read."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"cannot be read: {key}: {first['msg']}" if key else f"cannot be read: {first['msg']}"
