"""The one exception a user is meant to see: a message that names the place, what was found and what would be right."""

from __future__ import annotations


class UserError(Exception):
    """The recipe, the data or an argument is wrong. The command line prints the message and exits with status 2.

    Args:
        problems: every problem found, one string each, already naming its file, line or row.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


def first_line(error: BaseException) -> str:
    """Of a library's message, the part that fits into ours."""
    return str(error).strip().partition("\n")[0]


class RunFailed(Exception):
    """A run that cannot go on, through no mistake in its arguments. The command line prints it and exits with 1."""


MAX_PROBLEMS_SHOWN = 20


def shorten(problems: list[str]) -> list[str]:
    """At most `MAX_PROBLEMS_SHOWN` lines, with a count of the rest."""
    if len(problems) <= MAX_PROBLEMS_SHOWN:
        return problems
    return [*problems[:MAX_PROBLEMS_SHOWN], f"... and {len(problems) - MAX_PROBLEMS_SHOWN} more"]
