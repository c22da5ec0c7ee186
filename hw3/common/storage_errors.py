"""Explain failures of the disk: it is full or read-only, or a folder vanished while a command runs."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from hw3.common.disk import format_bytes, nearest_existing

_NO_SPACE = "free some space there, then run the same command again; complete files are intact"
_NOT_WRITABLE = "make it writable, or write to another folder"
_GONE = "if it was moved or deleted while the command ran, run the same command again"
_BROKEN = "the disk, or the network drive, does not work; check it, then run the same command again"
_ADVICE = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), then run the same command again",
    errno.EROFS: _NOT_WRITABLE,
    errno.EACCES: _NOT_WRITABLE,
    errno.EPERM: _NOT_WRITABLE,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.ESTALE: _BROKEN,
    errno.EIO: _BROKEN,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # of safetensors and tokenizers
# PyTorch does not report why `torch.save` cannot write. Nearly always the disk is full. If the last bytes of a file are
# the first ones that fail, the error is that of the C++ library: libstdc++ (Linux) or libc++ (macOS).
_TORCH_ERROR = re.compile(
    r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos|open file failed|(basic_ios|ios_base)::clear"
)
_TORCH_FOLDER_ERROR = re.compile(r"Parent directory (.+) does not exist")


def explain_os_error(error: OSError) -> str:
    """Return what failed and how to mend it, without the file's name."""
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0)
    return f"{reason}; {advice}" if advice else reason


def is_disk_full(error: OSError) -> bool:
    """Return whether the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain_storage_error(error: BaseException, folders: Sequence[Path]) -> str | None:
    """Return a message for the user; None if the error is no failure of the disk.

    Libraries wrap the errors of the operating system in their own.

    Args:
        error: the exception.
        folders: where the command writes. They are named if the error does not name a file.
    """
    found = _find_os_error(error)
    if found is None or (found.filename is None and found.errno not in _ADVICE):
        return None
    if found.filename is not None:
        return f"{os.fsdecode(found.filename)}: {explain_os_error(found)}"
    where = ", ".join(f"{folder} ({_format_free_space(folder)} free)" for folder in folders)
    return f"{where}: {explain_os_error(found)}"


def _find_os_error(error: BaseException | None) -> OSError | None:
    """Return the error of the operating system that caused an exception; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        if match := _RUST_ERROR.search(str(error)):
            return OSError(int(match[1]), os.strerror(int(match[1])))
        if isinstance(error, RuntimeError) and _TORCH_ERROR.search(str(error)):
            return OSError(errno.ENOSPC, "a file cannot be written")
        if isinstance(error, RuntimeError) and (match := _TORCH_FOLDER_ERROR.search(str(error))):
            return OSError(errno.ENOENT, os.strerror(errno.ENOENT), match[1])
        error = error.__cause__
    return None


def _format_free_space(folder: Path) -> str:
    return format_bytes(shutil.disk_usage(nearest_existing(folder.absolute())).free)
