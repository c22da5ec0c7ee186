"""Disk space, and whether a folder can be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hw3.common.errors import UserError


def check_new(folder: Path, option: str) -> None:
    """Refuse to write over anything, or where nothing can be written.

    Raises:
        UserError: says what is in the way.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: exists already, and nothing is written over it; delete it, or give {option}")
    check_writable(folder)


def check_writable(run: Path) -> None:
    """Refuse a run folder that cannot be made or written.

    Raises:
        UserError: says what is in the way.
    """
    folder = run
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{run}: {folder} is a file; give a folder: RUN= (--run)")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{run}: {folder} cannot be written to; give another folder: RUN= (--run)")


def check_disk(run: Path, needed: int) -> str:
    """One line on the disk that a run needs and has.

    Raises:
        UserError: there is less free than needed.
    """
    folder = run
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    line = f"disk: checkpoints take {gib(needed)}, {gib(free)} free"
    if needed > free:
        raise UserError(
            f"{run}: {line}; free some, raise training.save_steps, or set training.save_total_limit, or give RUN= on "
            "another disk"
        )
    return line


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
