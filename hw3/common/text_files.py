"""Read the text files that users give: bounded in size, in UTF-8, with the line of a wrong byte in the message."""

from __future__ import annotations

import codecs
import stat
from pathlib import Path

from hw3.common.disk import format_bytes
from hw3.common.errors import UserError

MAX_TEXT_FILE_BYTES = 2 * 2**30  # a file is read at once, and its text and rows take several times its size
# UTF-32 in little-endian order begins like UTF-16.
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def check_regular_file(path: Path) -> None:
    """Check that `path` is a file that can be read to its end, and not a device or a pipe.

    Raises:
        UserError: there is no such file, or it is not a regular one.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: cannot be read: Is a directory")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file; save the content of a device or pipe to a file first")


def read_utf8(path: Path) -> str:
    """Return the text of a regular file in UTF-8, without its byte-order mark if it has one.

    Raises:
        UserError: the file cannot be read, is too large, or is not text in UTF-8.
    """
    check_regular_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_FILE_BYTES:
            raise UserError(
                f"{path}: has {format_bytes(size)}; at most {format_bytes(MAX_TEXT_FILE_BYTES)} are read; split it"
            )
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith(_UTF_16_MARKS):
        raise UserError(f"{path}:1: begins with the byte-order mark of UTF-16 or UTF-32; save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + len(codecs.BOM_UTF8) * data.startswith(codecs.BOM_UTF8)
        line = data.count(b"\n", 0, start) + 1
        raise UserError(f"{path}:{line}: invalid UTF-8: byte 0x{data[start]:02x}; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: found a NUL character, expected text; save the file as UTF-8")
    return text
