"""Paths as result files store them, and as messages show them."""

from __future__ import annotations

from pathlib import Path


def portable_path(path: Path) -> str:
    """Return a path relative to the working directory where possible, and only its name otherwise.

    Result files hold no absolute path, so that a run folder can be moved and shared.
    """
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


def shown_path(path: Path) -> str:
    """Return a path for messages: relative if it is in the working directory, else as given; links are not followed."""
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()
