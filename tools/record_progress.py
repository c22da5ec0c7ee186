"""Write `docs/progress.md`: what `hw3` shows while it works, on a terminal and elsewhere.

Run it in the repository: `python tools/record_progress.py`. It trains, scores and predicts with the tiny model, twice,
in a temporary folder.
"""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
DOCUMENT = REPOSITORY / "docs/progress.md"
TERMINAL_SIZE = (40, 110)  # rows, columns
MAX_STATES = 5  # of one live line
COMMANDS = (
    ["train", "recipes/tiny/qlora.yaml", "--run", "RUN", "training.max_steps=40", "training.save_steps=20"],
    ["eval", "RUN"],
    ["predict", "RUN", "data/eval.json"],
    ["predict", "RUN", "--text", "今日無雨。", "--direction", "c2m"],
)

INTRODUCTION = """# Progress

What the commands show while they work. Results go to standard output. Progress and notices go to standard error, so
`hw3 predict RUN --text 今日無雨。 > output.txt` writes only the prediction to the file. `--quiet` leaves out progress
and notices, `--verbose` adds details and the warnings of libraries.

- On a terminal, one live line shows what is done and the time left. Its successive states stand below each other here.
- Elsewhere, such as in a log file, lines are printed: in training at every logging step, in scoring per entry, in
  prediction after a tenth of the rows or 30 s.

`tokens/s` is the speed of the steps since the line before. The time left follows from the mean speed since the end of
the first step, so that compilation does not count. After an interruption, both count only the steps since then.

Recorded with the tiny model on a CPU by `python tools/record_progress.py`.
"""


def record_on_terminal(command: list[str]) -> list[str]:
    """Run a command in a pseudo-terminal; return its lines, and the states of its live line one by one."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *TERMINAL_SIZE, 0, 0))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, cwd=REPOSITORY)
    os.close(terminal)
    output = b""
    try:
        while part := os.read(reader, 65536):
            output += part
    except OSError:  # Linux reports an error when the command has closed its end
        pass
    os.close(reader)
    if process.wait():
        raise SystemExit(f"{shlex.join(command)} failed:\n{output.decode()}")
    lines = []
    for line in output.decode().replace("\r\n", "\n").split("\n"):
        *states, last = (state.rstrip() for state in line.split("\r"))
        lines += _sample(list(dict.fromkeys(filter(None, states))))
        lines.append(last)
    return lines


def record_without_terminal(command: list[str]) -> list[str]:
    """Run a command whose output is no terminal; return its lines, those of standard error marked with `2>`."""
    marked = f"{{ {shlex.join(command)} 2>&1 >&3 3>&- | sed -u 's/^/2> /'; }} 3>&1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", marked], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}")
    return done.stdout.splitlines()


def _sample(states: list[str]) -> list[str]:
    """Return the first, the last and some states between them."""
    if len(states) <= MAX_STATES:
        return states
    return [states[round(place * (len(states) - 1) / (MAX_STATES - 1))] for place in range(MAX_STATES)]


def record(run: Path, run_command: Callable[[list[str]], list[str]]) -> str:
    """Run the commands one after another; return a text block with what was shown."""
    lines: list[str] = []
    for arguments in COMMANDS:
        words = [str(run) if word == "RUN" else word for word in arguments]
        lines += [f"$ hw3 {shlex.join(arguments)}", *run_command([sys.executable, "-m", "hw3", *words])]
    text = "\n".join(line.replace(str(run), "RUN").rstrip() for line in lines)
    return f"```text\n{text.rstrip()}\n```\n"


def main() -> int:
    """Write the document."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        on_terminal = record(Path(folder) / "terminal", record_on_terminal)
        without_terminal = record(Path(folder) / "file", record_without_terminal)
    note = "Lines that begin with `2>` went to standard error.\n"
    sections = [INTRODUCTION, "## On a terminal\n", on_terminal, "## Without a terminal\n", note, without_terminal]
    DOCUMENT.write_text("\n".join(sections), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
