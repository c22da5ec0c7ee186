"""Checks of output folders: do they exist, can they be written, is there enough disk space?"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from hw3.common.errors import UserError

# Linux takes names of 255 bytes and paths of 4,096. Temporary files and locks have longer names than what they are for,
# and a folder's files have longer paths than the folder.
_MAX_NAME_BYTES = 255 - 32
_MAX_PATH_BYTES = 4096 - 256


def check_folder_is_new(folder: Path, option: str) -> None:
    """Check that `folder` does not exist yet and can be created.

    Args:
        folder: the folder to create.
        option: what the user can set to choose another folder, for the message.

    Raises:
        UserError: the folder exists, or it cannot be created.
    """
    check_path(folder, option)
    if folder.exists() or folder.is_symlink():
        raise UserError(
            f"{folder}: already exists, and existing files are never overwritten; delete it or set {option}"
        )
    check_writable(folder, option)


def check_path(path: Path, option: str) -> None:
    """Check that a file or folder can have this path.

    Raises:
        UserError: a name or the path is too long, or has a null character; or libraries would write to another path.
    """
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not str(path).isascii():  # Rust libraries encode every path in UTF-8
        raise UserError(
            f"{path}: this locale encodes names in {encoding}, but libraries in UTF-8; set PYTHONUTF8=1 in the "
            f"environment, or a name in ASCII with {option}"
        )
    problem = None
    longest = max((len(os.fsencode(name)) for name in path.parts), default=0)
    if "\0" in str(path):
        problem = "has a null character"
    elif longest > _MAX_NAME_BYTES:
        problem = f"cannot be written: File name too long ({longest} bytes, expected at most {_MAX_NAME_BYTES})"
    elif (size := len(os.fsencode(path.absolute()))) > _MAX_PATH_BYTES:
        problem = f"cannot be written: File name too long (a path of {size} bytes, expected at most {_MAX_PATH_BYTES})"
    if problem is not None:
        raise UserError(f"{path}: {problem}; set another one with {option}")


def check_writable(path: Path, option: str = "RUN= (--run)", *, is_file: bool = False) -> None:
    """Check that a folder can be written, or created where it does not exist; or a file in its folder.

    Args:
        path: the folder or file.
        option: what the user can set to choose another one, for the message.
        is_file: whether it is a file.

    Raises:
        UserError: the path is too long, a parent is a file or a link to nothing, or it is not writable.
    """
    check_path(path, option)
    parent = path.parent if is_file else path
    while not os.path.exists(parent):  # `Path.exists` raises an error in a folder without permission
        if parent.is_symlink():
            raise UserError(f"{path}: {parent} is a link to nothing; set another one with {option}")
        parent = parent.parent
    if not os.path.isdir(parent):
        raise UserError(f"{path}: {parent} is a file, but a folder is needed; set another one with {option}")
    try:
        # `os.access` does not notice file systems that take no files, such as /proc. On most, this file has no name.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError:
        raise UserError(f"{path}: {parent} is not writable; set another folder with {option}") from None


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
