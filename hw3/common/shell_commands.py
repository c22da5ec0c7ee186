"""Commands that messages and reports suggest, as a user can paste them into the shell that runs this process."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def installed_command(program: str, *words: object) -> str:
    """Return a command line that calls a program of this Python environment with these arguments.

    If the environment is not activated, as when the Makefile calls `hw3`, the program is not on the PATH. The command
    then has its path relative to the working directory. A path outside of it is left out, because reports are shared.
    """
    script = Path(sys.executable).with_name(program)
    if shutil.which(program) is None and script.is_file() and script.is_relative_to(Path.cwd()):
        program = script.relative_to(Path.cwd()).as_posix()
    return shlex.join([program, *map(str, words)])


def hw3_command(*words: object) -> str:
    """Return a command line that calls `hw3` with these arguments."""
    return installed_command("hw3", *words)


def next_command(command: str, run: Path) -> str:
    """Return the command for the next step of a run: that of the Makefile, if the Makefile calls this process."""
    if "MAKELEVEL" in os.environ:
        return f"make {command} RUN={shlex.quote(str(run))}"
    return hw3_command(command, run)
