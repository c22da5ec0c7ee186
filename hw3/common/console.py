"""Streams of the commands: results on standard output; progress and notices on standard error.

Notices go through the loggers of the package (`logging.getLogger(__name__)`). This module is imported by every command,
so it imports nothing that takes long.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import TextIO

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
    """Let standard output escape characters that its encoding lacks, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_output(stream: TextIO) -> None:
    """Send a stream to the null device after its reader has closed the pipe.

    Python writes what is left in the buffer when it exits, and would report the closed pipe again.
    """
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


class _StandardErrorHandler(logging.Handler):
    """Prints to the present standard error, above the progress line if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line. If nobody reads standard error any more, the command goes on without notices."""
        if sys.stderr is None:  # the process was started without standard error
            return
        line = self.format(record)
        try:
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr)
            sys.stderr.flush()
        except BrokenPipeError:
            discard_output(sys.stderr)
