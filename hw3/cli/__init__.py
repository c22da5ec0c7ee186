"""The command line: parse the arguments of each `hw3` command, then call the function that does the work."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from hw3 import __version__
from hw3.cli import data_commands, doctor_command, run_commands
from hw3.cli.parsing import EscapingParser, add_verbosity
from hw3.common.console import configure_logging, discard_output, escaped_output, print_error
from hw3.common.errors import RunError, UserError
from hw3.common.signals import StoppedBySignal, stopped_by_signals
from hw3.common.storage_errors import explain_storage_error

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
    try:
        try:
            with escaped_output(), stopped_by_signals():
                return _run_command(argv)
        finally:
            if sys.stdout is not None:  # None if the process was started without standard output
                sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        discard_output(sys.stdout)
        return 128 + signal.SIGTERM


def _run_command(argv: list[str] | None) -> int:
    arguments = _parse(_build_parser(), argv)
    configure_logging(getattr(arguments, "log_level", logging.INFO))
    try:
        return arguments.run_command(arguments)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(FIRST_PROCESS_REPORT_SECONDS)
        print_error(f"hw3: {error}")
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
        message = explain_storage_error(error, _list_output_folders(arguments))
        is_explained = message is not None and not logging.getLogger("hw3").isEnabledFor(logging.DEBUG)
        print_error(f"hw3: {message}" if is_explained else traceback.format_exc().rstrip())
        return 1


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
