"""JSON files of a run folder are checked when they are read."""

from pathlib import Path

import pytest
from pydantic import Field

from hw3.common.errors import UserError
from hw3.runs.file_model import FileModel


class Inner(FileModel):
    count: int


class Outer(FileModel):
    schema_version: int = Field(1, alias="schema")
    text: str
    inner: Inner


def test_write_and_read_return_the_same_value(tmp_path: Path) -> None:
    value = Outer(text="甲", inner=Inner(count=2))
    value.write(tmp_path / "folder/file.json")
    assert (tmp_path / "folder/file.json").read_text(encoding="utf-8") == (
        '{\n  "schema": 1,\n  "text": "甲",\n  "inner": {\n    "count": 2\n  }\n}\n'
    )
    assert Outer.read(tmp_path / "folder/file.json") == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '{"schema": 1, "text": "a", "inner": {"count": 1, "extra": 2}}',
            "inner.extra: Extra inputs are not permitted",
        ),
        ('{"schema": 1, "text": "a", "inner": {"count": "1"}}', "inner.count: Input should be a valid integer"),
        ('{"schema": 1, "text": "a"}', "inner: Field required"),
        ('{"schema": 1', "Invalid JSON: EOF while parsing an object"),
    ],
)
def test_read_names_the_file_and_the_first_wrong_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        Outer.read(path)
    (message,) = error.value.problems
    assert message.startswith(f"{path}: cannot be read: {problem}")
    assert message.endswith("; delete the file, and the command that wrote it writes it again")


def test_read_reports_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Outer.read(tmp_path / "file.json")
