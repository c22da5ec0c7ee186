"""Helpers that the parsers of several commands share."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any, NoReturn

from hw3.common.text import escape_invisible

Commands = argparse._SubParsersAction  # argparse has no public name for it


class EscapingParser(argparse.ArgumentParser):
    """A parser whose errors show invisible characters of arguments, such as file names, as escapes."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        super().error(escape_invisible(message))


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its parsed arguments; return its parser."""
    # Without abbreviations, so that a mistyped option is refused.
    command = commands.add_parser(
        name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}.", allow_abbrev=False
    )
    command.set_defaults(run_command=run)
    add_verbosity(command)
    return command


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Let a parser accept --verbose and --quiet, which set `log_level`; it stays absent without them."""
    group = parser.add_mutually_exclusive_group()
    options: dict[str, Any] = {"action": "store_const", "dest": "log_level", "default": argparse.SUPPRESS}
    group.add_argument("--verbose", const=logging.DEBUG, help="also show details and warnings of libraries", **options)
    group.add_argument("--quiet", const=logging.WARNING, help="show only results, warnings and errors", **options)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Let a command accept `section.key=value` assignments that change its recipe."""
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change a value of the recipe for this command"
    )
