"""Atomic writes: a reader sees either the old content of a file or the new one, even after a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, and create its parent folders.

    The text goes to a temporary file beside `path`, is flushed to disk, and then replaces `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def apply_umask(folder: Path) -> None:
    """Set the permissions of a folder's files to those that the user's umask allows.

    safetensors writes files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    """Write a value atomically as indented JSON with a final newline."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_json_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON list atomically, with one row per line.

    This is ten times as fast as indented JSON, and line-based tools can read the file.
    """
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_atomically(path, f"[\n{lines}\n]\n")
