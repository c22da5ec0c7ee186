"""A run's folder: its recipe and manifest, which checkpoints are complete, what may change on resume, disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hw3.common.hashing import file_sha256
from hw3.data.rows import Row

RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"

PACKAGES = ("torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "tokenizers")


def read_manifest(run: Path) -> dict[str, Any]:
    """The run's manifest; empty where there is none yet."""
    try:
        return json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def environment() -> dict[str, Any]:
    """Versions, Python and git commit, for the manifest."""
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "python": ".".join(map(str, sys.version_info[:3])),
        "git_commit": _git_commit(),
    }


def portable(path: Path) -> str:
    """A path as results keep it: relative where it can be, else the name alone."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


def data_facts(path: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """What manifest, results and predictions say of a file of rows."""
    return {"path": portable(path), "sha256": file_sha256(path), "rows": len(rows)}


def is_other_file(stored: dict[str, Any], data: dict[str, Any], path: Path) -> bool:
    """Whether what is stored is of another file with the same name as `path`, rather than of this one, edited or not.

    Args:
        stored: `data_facts` of the stored one.
        data: `data_facts` of `path`.
        path: the file at hand.
    """
    # Of a file outside the working directory only the name is known, and names repeat.
    edited = stored["path"] == data["path"] and path.resolve().is_relative_to(Path.cwd())
    return not edited and stored["sha256"] != data["sha256"]


def _git_commit() -> str | None:
    if "GIT_COMMIT" in os.environ:  # a copy without its history
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
