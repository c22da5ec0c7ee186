"""`hw3 predict` for one text, or for lines of a pipe or a terminal: one in, one answer out, at once."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from hw3.common.errors import UserError
from hw3.data.templates import TEMPLATES, Direction
from hw3.generation.generator import Answerer

TEXT = "{x}"


def answer_lines(
    run: Path,
    *,
    text: str | None = None,
    direction: Direction | None = None,
    template: str | None = None,
    overrides: list[str] | None = None,
    checkpoint: str = "best",
    shots: int = 0,
    anyway: bool = False,
) -> int:
    """Answer one text, or every line of standard input as it comes; one line in, one answer out.

    Args:
        run: the run folder.
        text: the text; lines are read if None.
        direction: `m2c` or `c2m`, to word the request plainly.
        template: a wording of one's own, with `{x}` for the text; `\\n` in it is a new line. Without it and a direction
            the text is the whole instruction.
        overrides: `generation.key=value` assignments.
        checkpoint: as for `predict_run`.
        shots: as for `predict_run`.
        anyway: as for `predict_run`.

    Raises:
        UserError: the template has no single `{x}`, or a text is empty or not UTF-8; otherwise as `predict_run`.
    """
    wording = _wording(direction, template)
    if text is not None:
        _check(text, "--text")
        if not text.strip():
            raise UserError("--text: is empty")
    answerer = Answerer.of(run, overrides, checkpoint, shots, anyway)
    print(answerer.chosen, file=sys.stderr)
    _ = answerer.model  # before a line is asked for
    if text is not None:
        print(answerer.answer(wording.replace(TEXT, text)))
        return 0
    came = False
    for line in _lines():
        came = True
        answer = answerer.answer(wording.replace(TEXT, line)) if line.strip() else ""
        # Line for line, whatever the model wrote.
        print(" ".join(answer.splitlines()), flush=True)
    if not came and not sys.stdin.isatty():
        raise UserError("standard input: no line came; give lines, a FILE of rows, or --text")
    return 0


def one_file(words: list[str]) -> tuple[Path | None, list[str]]:
    """The file among a command line's words, if any, and its `key=value` assignments.

    Raises:
        UserError: there are several files.
    """
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) > 1:
        raise UserError(f"{', '.join(files)}: one file at a time")
    return (Path(files[0]) if files else None), [word for word in words if word not in files]


def lines_are_meant(
    file: Path | None, output: Path | None, *, text: str | None, direction: str | None, template: str | None
) -> bool:
    """Whether a call is about a text or lines: for `-`, a text or a wording, or where lines are piped in.

    Raises:
        UserError: a file of rows is given as well, or one to write.
    """
    worded = any(word is not None for word in (text, direction, template))
    if worded and str(file) not in ("None", "-"):
        raise UserError(f"{file}: its rows are worded already; --text, --direction and --template are about lines")
    if (worded or str(file) == "-") and output is not None:
        raise UserError("--output is for a file's rows; answers to lines go to standard output")
    if file is not None or output is not None or worded:
        return worded or str(file) == "-"
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _wording(direction: Direction | None, template: str | None) -> str:
    if template is None:
        return next((plain.text for plain in TEMPLATES if plain.direction == direction), TEXT)
    template = template.replace("\\n", "\n")
    if template.count(TEXT) != 1:
        raise UserError(f"--template {template!r}: must hold {TEXT}, where the text goes, exactly once")
    return template


def _lines() -> Iterator[str]:
    """Lines of standard input; the prompt sign shows on a terminal only."""
    sign = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # editing and history for input(), where there is any
            import readline  # noqa: F401
        sign = "> "
    while True:
        try:
            line = input(sign)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("standard input: not UTF-8 text") from None
        _check(line, "standard input")
        yield line


def _check(text: str, source: str) -> None:
    """Refuse what Python has kept of bytes that are no text."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{source}: not UTF-8 text")
