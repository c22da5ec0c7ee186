"""Exceptions whose message is meant for the user.

A message reports where the problem is, what was found, what was expected, and how to fix it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MAX_PROBLEMS_SHOWN = 20


class UserError(Exception):
    """The recipe, the data or an argument is wrong. The command line prints the message and exits with status 2.

    Args:
        problems: every problem found, one string each, with its file, line or row.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class ProblemCollector:
    """Collect the problems of several checks, to report them in one message.

    Attributes:
        problems: the problems so far.
    """

    def __init__(self, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems)

    def collect(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the result of a check; None if it raises a `UserError`, whose problems are collected."""
        try:
            return check(*args, **kwargs)
        except UserError as error:
            self.problems += error.problems
            return None

    def raise_problems(self) -> None:
        """Raise a `UserError` with every problem once, if there are any."""
        if self.problems:
            raise UserError(*dict.fromkeys(self.problems))


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
