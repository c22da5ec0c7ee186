"""Exceptions whose message is meant for the user.

A message reports where the problem is, what was found, what was expected, and how to fix it.
"""

from __future__ import annotations

MAX_PROBLEMS_SHOWN = 20


class UserError(Exception):
    """The recipe, the data or an argument is wrong. The command line prints the message and exits with status 2.

    Args:
        problems: every problem found, one string each, with its file, line or row.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class RunError(Exception):
    """A run failed although its arguments are right. The command line prints the message and exits with status 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to quote it inside another message."""
    return str(error).strip().partition("\n")[0]


def truncate_problems(problems: list[str]) -> list[str]:
    """Return the first `MAX_PROBLEMS_SHOWN` problems, followed by a line with the number of the others."""
    if len(problems) <= MAX_PROBLEMS_SHOWN:
        return problems
    return [*problems[:MAX_PROBLEMS_SHOWN], f"... and {len(problems) - MAX_PROBLEMS_SHOWN} more"]
