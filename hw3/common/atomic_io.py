"""Atomic writes: a reader sees either the old content of a file or the new one, even after a crash."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hw3.common.errors import RunError, UserError
from hw3.common.storage_errors import explain_os_error

LEFTOVER_SECONDS = 600  # no process takes this long between creating a temporary file and renaming it


def check_replaceable(path: Path) -> None:
    """Check that `path` is a regular file, a link to one, or does not exist.

    Raises:
        UserError: it is a folder, a device, a pipe, or a link to nothing.
    """
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    if is_folder:
        raise UserError(f"{path}: is a folder; give the name of a file")
    if os.path.lexists(path) and not is_file:
        raise UserError(f"{path}: is not a regular file, so it is not overwritten; give the name of a file")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically, and create its parent folders. Text is encoded in UTF-8.

    The content goes to a temporary file beside `path`, is flushed to disk, and then replaces `path`. If `path` is a
    link, this happens to the file that it points to.

    Raises:
        UserError: something else than a file is there.
        RunError: the file cannot be written, for example because the disk is full.
    """
    check_replaceable(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        flush(target.parent)
    except OSError as error:  # such as a full disk
        raise RunError(f"{path}: cannot be written: {explain_os_error(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Delete the new content of a file that other processes left when they were killed."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*"):
        with contextlib.suppress(OSError):  # another process may delete or rename it
            if path.suffix[1:].isdecimal() and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def flush_folder(folder: Path) -> None:
    """Wait until all files of a folder, and the folders themselves, are on disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's own list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Write a JSON list atomically, with one row per line."""
    write_atomically(path, format_json_rows(rows))


def format_json_rows(rows: Iterable[dict[str, Any]]) -> str:
    """Return a JSON list with one row per line.

    This is ten times as fast as indented JSON, and line-based tools can read the file.
    """
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f"[\n{lines}\n]\n"
