"""Streams of the commands: results on standard output; progress and notices on standard error.

Notices go through the loggers of the package (`logging.getLogger(__name__)`). This module is imported by every command,
so it imports nothing that takes long.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast

from hw3.common.errors import RunError
from hw3.common.storage_errors import explain_os_error
from hw3.common.text import escape_invisible

package_logger = logging.getLogger("hw3")


def configure_logging(level: int) -> None:
    """Print the package's notices to standard error, as plain lines; on the first process only.

    Errors are printed by all processes. Warnings of libraries are shown only at the level DEBUG.

    Args:
        level: DEBUG, INFO or WARNING.
    """
    is_first_process = os.environ.get("RANK", "0") == "0"
    package_logger.setLevel(level if is_first_process else logging.ERROR)
    package_logger.handlers = [_StandardErrorHandler()]
    package_logger.propagate = False  # libraries may add a handler to the root logger
    if not sys.warnoptions:
        warnings.simplefilter("default" if level == logging.DEBUG else "ignore")


def escape_unencodable_characters() -> None:
    """Let standard output and standard error escape characters that their encodings lack."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escape invisible characters of everything that is printed to standard output inside the block.

    Row ids, file names and texts of users may contain them. `print_unescaped` prints text as it is. Standard error
    is not changed, because progress lines need control characters: `print_error` and the loggers escape their texts.
    """
    escape_unencodable_characters()
    stdout = sys.stdout
    if stdout is not None:  # None if the process was started without standard output
        sys.stdout = cast(TextIO, _EscapingStream(stdout))
    try:
        yield
    finally:
        sys.stdout = stdout


def print_unescaped(text: str) -> None:
    """Print a text whose parts from users are escaped already, such as one with colors, or data for another program."""
    stream = getattr(sys.stdout, "unescaped", sys.stdout)
    with _explained(stream):
        print(text, file=stream, flush=True)


def flush_output() -> None:
    """Write what was printed to standard output and is not yet there.

    Raises:
        BrokenPipeError: nobody reads it any more.
        RunError: it cannot be written, for example to a file on a full disk.
    """
    if sys.stdout is not None:  # None if the process was started without standard output
        with _explained(sys.stdout):
            sys.stdout.flush()


def print_error(text: str) -> None:
    """Print a text to standard error, with invisible characters escaped."""
    if sys.stderr is not None:
        print(escape_invisible(text), file=sys.stderr, flush=True)


def discard_output(stream: TextIO) -> None:
    """Send a stream to the null device after its reader has closed the pipe, or the disk is full.

    Python writes what is left in the buffer when it exits, and would report the error again.
    """
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


@contextlib.contextmanager
def _explained(stream: TextIO) -> Iterator[None]:
    """Turn an error of standard output inside the block into a `RunError`, and discard what would follow."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output(stream)
        raise RunError(f"standard output: cannot be written: {explain_os_error(error)}") from error


class _EscapingStream:
    """A text stream that escapes invisible characters, and otherwise behaves like the stream it writes to.

    Attributes:
        unescaped: that stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        """Write a text, and return its length before escaping."""
        with _explained(self.unescaped):
            self.unescaped.write(escape_invisible(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with _explained(self.unescaped):
            self.unescaped.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


class _StandardErrorHandler(logging.Handler):
    """Prints to the present standard error, above the progress line if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line. If nobody reads standard error any more, the command is stopped as by SIGTERM."""
        if sys.stderr is None:  # the process was started without standard error
            return
        line = escape_invisible(self.format(record))
        try:
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr)
            sys.stderr.flush()
        except BrokenPipeError:
            discard_output(sys.stderr)
            signal.raise_signal(signal.SIGTERM)
