"""`hw3 predict` for one text, or for the lines of a pipe or a terminal: each is translated as soon as it is read."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from hw3.common.console import print_unescaped
from hw3.common.errors import UserError
from hw3.common.text import has_surrogates
from hw3.data.templates import TEMPLATES, Direction
from hw3.runs.run import Run

PLACEHOLDER = "{x}"  # where a template takes the text

logger = logging.getLogger(__name__)


def predict_lines(
    run: Run,
    *,
    text: str | None = None,
    direction: Direction | None = None,
    template: str | None = None,
    overrides: list[str] | None = None,
    checkpoint: str = "best",
    shots: int = 0,
    allow_mismatch: bool = False,
) -> int:
    r"""Print the output for one text, or for every line of standard input as soon as it is read.

    Standard output holds one line per line of input. A notice on standard error reports which checkpoint is used.

    Args:
        run: the run.
        text: the text; None reads lines.
        direction: `m2c` or `c2m`, to use the homework's first template of this direction.
        template: a template of the user, with `{x}` for the text; `\n` in it is a line break. Without template and
            direction, the text is the complete instruction.
        overrides: `generation.key=value` assignments.
        checkpoint: as for `predict_run`.
        shots: number of few-shot examples in the prompt.
        allow_mismatch: use checkpoints that were trained with another prompt, base model or quantization.

    Returns:
        0.

    Raises:
        UserError: the template does not contain `{x}` exactly once, a text is empty or not UTF-8, or standard input is
            empty; otherwise as `predict_run`.
    """
    from hw3.generation.generator import RunGenerator  # takes seconds; the other functions only sort arguments

    template = _resolve_template(direction, template)
    if text is not None:
        _check_utf8(text, "--text")
        if not text.strip():
            raise UserError("--text: is empty; give a text to translate")
    generator = RunGenerator.open(run, checkpoint, shots=shots, overrides=overrides, allow_mismatch=allow_mismatch)
    logger.info(generator.selection)
    _ = generator.model  # load the weights before the first line is asked for
    if text is not None:
        _print_output(generator.generate_text(template.replace(PLACEHOLDER, text)))
        return 0
    num_lines = 0
    for line in _read_lines():
        num_lines += 1
        output = generator.generate_text(template.replace(PLACEHOLDER, line)) if line.strip() else ""
        _print_output(" ".join(output.splitlines()))
    if not num_lines and not sys.stdin.isatty():
        raise UserError("standard input: no lines; give lines, a FILE of rows, or --text")
    return 0


def split_input_and_overrides(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Split positional arguments into the input file, if any, and the `key=value` overrides.

    Raises:
        UserError: there is more than one file.
    """
    files = [argument for argument in arguments if "=" not in argument or Path(argument).is_file()]
    if len(files) > 1:
        raise UserError(f"{', '.join(files)}: several input files; give one file per call")
    overrides = [argument for argument in arguments if argument not in files]
    return (Path(files[0]) if files else None), overrides


def is_interactive(
    input_file: Path | None, output: Path | None, *, text: str | None, direction: str | None, template: str | None
) -> bool:
    """Return whether to predict one text or lines, and not a file of rows.

    This is so with `-` as the file, with a text, a direction or a template, and if standard input is a pipe or a file.

    Raises:
        UserError: a file of rows or an output file was given as well.
    """
    has_text_option = any(option is not None for option in (text, direction, template))
    reads_stdin = str(input_file) == "-"
    if has_text_option and input_file is not None and not reads_stdin:
        raise UserError(
            f"{input_file}: its rows are complete instructions; --text, --direction and --template are for lines"
        )
    if (has_text_option or reads_stdin) and output is not None:
        raise UserError("--output is for a file of rows; outputs for lines are printed to standard output")
    if input_file is not None or output is not None or has_text_option:
        return has_text_option or reads_stdin
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # standard input is closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _resolve_template(direction: Direction | None, template: str | None) -> str:
    if template is None:
        return next((known.text for known in TEMPLATES if known.direction == direction), PLACEHOLDER)
    template = template.replace("\\n", "\n")
    if template.count(PLACEHOLDER) != 1:
        raise UserError(
            f"--template {template!r}: found {PLACEHOLDER} {template.count(PLACEHOLDER)} times; it must stand exactly "
            "once, where the text goes"
        )
    return template


def _print_output(output: str) -> None:
    """Print an output: with invisible characters escaped on a terminal, unchanged for another program."""
    if sys.stdout.isatty():
        print(output, flush=True)
    else:
        print_unescaped(output)


def _read_lines() -> Iterator[str]:
    """Yield the lines of standard input. A prompt sign is shown only on a terminal."""
    sign = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # gives input() line editing and a history where Python has readline
            import readline  # noqa: F401
        sign = "> "
    elif isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig")  # a file or pipe is in UTF-8, whatever the terminal's encoding is
    while True:
        try:
            line = input(sign)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("standard input: not UTF-8 text") from None
        _check_utf8(line, "standard input")
        yield line


def _check_utf8(text: str, source: str) -> None:
    """Refuse text from bytes that are not UTF-8; Python represents such bytes as surrogates."""
    if has_surrogates(text):
        raise UserError(f"{source}: not UTF-8 text")
