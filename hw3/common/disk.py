"""Checks of output folders: do they exist, can they be written, is there enough disk space?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hw3.common.errors import UserError


def check_folder_is_new(folder: Path, option: str) -> None:
    """Check that `folder` does not exist yet and can be created.

    Args:
        folder: the folder to create.
        option: what the user can set to choose another folder, for the message.

    Raises:
        UserError: the folder exists, or it cannot be created.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(
            f"{folder}: already exists, and existing files are never overwritten; delete it or set {option}"
        )
    check_writable(folder, option)


def check_writable(folder: Path, option: str = "RUN= (--run)") -> None:
    """Check that `folder` can be written, or created where it does not exist.

    Args:
        folder: the folder.
        option: what the user can set to choose another folder, for the message.

    Raises:
        UserError: a parent is a file, or it is not writable.
    """
    parent = nearest_existing(folder)
    if not parent.is_dir():
        raise UserError(f"{folder}: {parent} is a file, but a folder is needed; set another one with {option}")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{folder}: {parent} is not writable; set another folder with {option}")


def check_disk_space(run: Path, needed: int) -> str:
    """Return a line with the disk space that a run needs and that is free.

    Args:
        run: the run folder, which need not exist.
        needed: bytes that the run will write.

    Raises:
        UserError: less is free than needed.
    """
    free = shutil.disk_usage(nearest_existing(run)).free
    line = f"disk: checkpoints need {format_bytes(needed)}, {format_bytes(free)} free"
    if needed > free:
        raise UserError(
            f"{run}: {line}; free some space, raise training.save_steps, set training.save_total_limit, or set RUN= to "
            "a folder on another disk"
        )
    return line


def format_bytes(size: int) -> str:
    """Return a number of bytes as text: GiB from 128 MiB upwards, else MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def nearest_existing(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path
