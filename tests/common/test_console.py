"""Notices go to standard error, by level and on the first process; standard output escapes what it cannot encode."""

import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY

from hw3.common.console import (
    configure_logging,
    escape_unencodable_characters,
    escaped_output,
    print_error,
    print_unescaped,
)

logger = logging.getLogger("hw3.some.module")


# Logs three notices, and prints a line.
NOTICES = (
    "import logging\n"
    "from hw3.common.console import configure_logging\n"
    "configure_logging(logging.INFO)\n"
    "for _ in range(3): logging.getLogger('hw3').info('notice')\n"
    "print('done')\n"
)


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    yield
    configure_logging(logging.INFO)


def log_all_levels() -> None:
    logger.debug("detail")
    logger.info("notice")
    logger.warning("warning")
    logger.error("error")


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        (logging.DEBUG, ["detail", "notice", "warning", "error"]),
        (logging.INFO, ["notice", "warning", "error"]),
        (logging.WARNING, ["warning", "error"]),
    ],
)
def test_notices_go_to_standard_error_as_plain_lines(
    level: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(level)
    log_all_levels()
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", lines)


def test_only_the_first_process_logs_notices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    configure_logging(logging.DEBUG)
    log_all_levels()
    assert capsys.readouterr().err == "error\n"


@pytest.mark.parametrize(("level", "shown"), [(logging.DEBUG, 1), (logging.INFO, 0)])
def test_warnings_of_libraries_are_shown_with_verbose_only(level: int, shown: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        configure_logging(level)
        warnings.warn("of a library", UserWarning, stacklevel=1)
    assert len(caught) == shown


def test_standard_output_escapes_characters_that_its_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    escape_unencodable_characters()
    print("山 a", flush=True)
    assert buffer.getvalue() == b"\\u5c71 a\n"


def test_standard_output_escapes_control_characters_except_of_prepared_texts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with escaped_output():
        print("甲\x1b[31m\r乙\u202e\t丙", "丁\u200f", sep="\n")
        print_unescaped("\x1b[31m戊")
        assert not sys.stdout.isatty() and sys.stdout.encoding.lower() == "utf-8"
    print("\r己")
    assert capsys.readouterr().out == "甲\\u001b[31m\\u000d乙\\u202e\t丙\n丁\\u200f\n\x1b[31m戊\n\r己\n"


def test_notices_and_errors_escape_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(logging.INFO)
    logger.warning("a\x1b[2Jb\u202e\nc")
    print_error("d\re\nf")
    assert capsys.readouterr().err == "a\\u001b[2Jb\\u202e\nc\nd\\u000de\nf\n"


def test_closed_pipe_of_standard_error_is_a_sigterm() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", NOTICES], stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_missing_standard_error_does_not_send_notices_to_standard_output() -> None:
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, NOTICES]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["at the end", "at once"])
def test_full_disk_of_standard_output_ends_in_one_message(environment: dict[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = "import sys\nfrom hw3.cli import main\nsys.exit(main(['data', 'check', 'data/eval.json']))"
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env=inherited | environment,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("hw3: standard output: cannot be written: No space left on device;")
    assert done.stderr.count("hw3: ") == 1 and "Traceback" not in done.stderr
