"""A live line on a terminal, plain lines elsewhere, and the time left."""

import contextlib
import fcntl
import logging
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator

import pytest

from hw3.common.console import configure_logging
from hw3.common.progress import ProgressLine


class Clock:
    """Stands for `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("hw3.common.progress.time.monotonic", clock)
    return clock


@pytest.fixture(autouse=True)
def notices() -> Iterator[None]:
    configure_logging(logging.INFO)
    yield
    configure_logging(logging.INFO)


def test_time_left_counts_only_the_units_since_the_clock_was_started(clock: Clock) -> None:
    line = ProgressLine("train", 110, "steps", initial=50)
    assert line.time_left() == ""
    clock.now += 1000  # the first step compiles
    line.advance()
    line.restart_clock()
    assert line.time_left() == ""
    clock.now += 9
    line.advance(9)
    assert line.time_left() == "00:50 left"
    line.advance(50)
    assert line.time_left() == ""


def test_plain_lines_are_logged_after_a_tenth_of_the_work(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("predict", 40, "rows", is_logged=True)
    for _ in range(40):
        clock.now += 2
        line.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "predict: 4 of 40 rows, 01:12 left"


def test_plain_lines_are_not_logged_every_moment(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("predict", 40, "rows", is_logged=True)
    for _ in range(40):
        clock.now += 0.01
        line.advance()
    assert capsys.readouterr().err == ""


def test_plain_lines_are_logged_after_30_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("predict", 1000, "rows", is_logged=True)
    for _ in range(7):
        clock.now += 10
        line.advance()
    assert [text.split(",")[0] for text in capsys.readouterr().err.splitlines()] == [
        "predict: 3 of 1000 rows",
        "predict: 6 of 1000 rows",
    ]


def use_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> int:
    """Make standard error a terminal; return the file descriptor that reads what is shown."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.setattr("sys.stderr", os.fdopen(terminal, "w", encoding="utf-8"))
    return reader


def read_all(reader: int) -> str:
    """Close the terminal, and return what was shown on it."""
    sys.stderr.close()
    parts = []
    with contextlib.suppress(OSError):  # Linux reports an error at the end
        while part := os.read(reader, 4096):
            parts.append(part)
    os.close(reader)
    return b"".join(parts).decode()


def test_terminal_shows_a_live_line_and_notices_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = use_terminal(monkeypatch, 100)
    with ProgressLine("eval", 8, "rows", is_logged=True) as line:
        assert line.is_live
        line.set_details("1/2 entries")
        logging.getLogger("hw3.evaluation").info("notice")
        line.advance(4)
        line.set_details("2/2 entries")
    shown = read_all(reader)
    states = [state.strip() for state in shown.replace("\n", "\r").split("\r") if state.strip()]
    assert states[0] == "eval |                    | 0/8 rows"
    assert "notice" in states and "eval |                    | 0/8 rows, 1/2 entries" in states
    assert states[-1].startswith("eval |██████████          | 4/8 rows, 2/2 entries, 00:0")
    assert shown.endswith("\r")  # the line is removed


@pytest.mark.parametrize(("columns", "level", "rank"), [(0, "INFO", "0"), (100, "WARNING", "0"), (100, "INFO", "1")])
def test_no_live_line_without_width_with_quiet_or_on_other_processes(
    monkeypatch: pytest.MonkeyPatch, columns: int, level: str, rank: str
) -> None:
    use_terminal(monkeypatch, columns)
    monkeypatch.setenv("RANK", rank)
    configure_logging(logging.getLevelNamesMapping()[level])
    assert not ProgressLine("eval", 8, "rows").is_live
