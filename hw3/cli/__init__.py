"""The command line: parse the arguments of each `hw3` command, then call the function that does the work."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from hw3 import __version__
from hw3.cli import data_commands, doctor_command, run_commands, search_command
from hw3.cli.parsing import EscapingParser, add_verbosity
from hw3.common.console import configure_logging, discard_output, escaped_output, flush_output, print_error
from hw3.common.errors import RunError, UserError, first_line
from hw3.common.shell_commands import hw3_command
from hw3.common.signals import StoppedBySignal, stopped_by_signals
from hw3.common.storage_errors import explain_storage_error
from hw3.common.text import escape_invisible

# All processes meet a user's mistake alike. The others wait this long, so that only the first process of a machine
# reports it: the launcher ends them as soon as the first one has exited.
FIRST_PROCESS_REPORT_SECONDS = 20


def main(argv: list[str] | None = None) -> int:
    """Run one `hw3` command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0 if all is done; 2 if the recipe, the data or an argument is wrong; 128 plus its number if a
        signal stopped the command, and 143, as for SIGTERM, if the reader closed the pipe; 1 for any other failure.
    """
    if sys.platform == "win32":
        print_error("hw3: does not run on Windows itself; use the Windows Subsystem for Linux: wsl --install")
        return 2
    try:
        try:
            with escaped_output(), stopped_by_signals():
                return _run_command(argv)
        finally:
            flush_output()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        discard_output(sys.stdout)
        return 128 + signal.SIGTERM
    except RunError as error:  # the last lines cannot be written
        print_error(f"hw3: {error}")
        return 1


def _run_command(argv: list[str] | None) -> int:
    arguments = _parse(_build_parser(), argv)
    configure_logging(getattr(arguments, "log_level", logging.INFO))
    try:
        return arguments.run_command(arguments)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(FIRST_PROCESS_REPORT_SECONDS)
        # A line end in a file's name would end the message.
        problems = (escape_invisible(problem, keep="\t") for problem in error.problems)
        print_error("hw3: " + "\n".join(problems))
        return 2
    except RunError as error:
        processes = os.environ.get("WORLD_SIZE", "1")
        process = f", process {os.environ['RANK']} of {processes}" if processes != "1" else ""
        print_error(f"hw3{process}: {error}")
        return 1
    except KeyboardInterrupt as stop:
        return 128 + (stop.number if isinstance(stop, StoppedBySignal) else signal.SIGINT)
    except BrokenPipeError:
        raise
    except Exception as error:
        message = (
            _explain_out_of_memory(error)
            or _explain_import_error(error)
            or explain_storage_error(error, _list_output_folders(arguments))
        )
        is_explained = message is not None and not logging.getLogger("hw3").isEnabledFor(logging.DEBUG)
        print_error(f"hw3: {message}" if is_explained else traceback.format_exc().rstrip())
        is_bad_name = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG  # of an argument or in a recipe
        return 2 if is_bad_name else 1


def _explain_out_of_memory(error: Exception) -> str | None:
    """Return a message if the GPU's memory ran out in a command that has no advice of its own; else None."""
    torch = sys.modules.get("torch")  # a command that does not import it cannot raise its error
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    return f"out of memory: {first_line(error)[:300]}\nclose other programs that use the GPU, or use a larger one"


def _explain_import_error(error: Exception) -> str | None:
    """Return a message if a package is missing or broken; else None."""
    if not isinstance(error, ImportError):
        return None
    return f"{type(error).__name__}: {first_line(error)}; to see which package is broken, run {hw3_command('doctor')}"


def _list_output_folders(arguments: argparse.Namespace) -> list[Path]:
    """Return where a command writes, as far as its arguments name it, and the folder of temporary files."""
    named = (getattr(arguments, name, None) for name in ("run", "output"))
    return [*(path for path in named if isinstance(path, Path)), Path(tempfile.gettempdir())]


def _build_parser() -> argparse.ArgumentParser:
    parser = EscapingParser(
        prog="hw3", description="Fine-tune a model from a YAML recipe and evaluate it by output-only perplexity."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_verbosity(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run_commands.add_train_command(commands)
    run_commands.add_eval_command(commands)
    run_commands.add_verify_command(commands)
    run_commands.add_predict_command(commands)
    run_commands.add_compare_command(commands)
    run_commands.add_report_command(commands)
    run_commands.add_check_command(commands)
    run_commands.add_pack_command(commands)
    run_commands.add_export_command(commands)
    search_command.add_search_command(commands)
    doctor_command.add_doctor_command(commands)
    data_parser = commands.add_parser("data", help="build, import and check data files", allow_abbrev=False)
    data = data_parser.add_subparsers(required=True, metavar="build|rows|check")
    data_commands.add_build_command(data)
    data_commands.add_rows_command(data)
    data_commands.add_check_command(data)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments, and also accept overrides and the file to predict after the options.

    argparse accepts positional arguments only in one block.
    """
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all(_is_late_positional(arg, arguments) for arg in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _is_late_positional(argument: str, arguments: argparse.Namespace) -> bool:
    if argument.startswith("-"):
        return argument == "-" and arguments.run_command is run_commands.run_predict
    return "=" in argument or arguments.run_command is run_commands.run_predict
