"""Run the scripts in tools/ as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import REPOSITORY


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script of tools/ in its own process."""
    return subprocess.run(
        [sys.executable, REPOSITORY / "tools" / name, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def write_pairs(folder: Path, *lines: str) -> Path:
    """Write a folder with one pairs file, tales.tsv."""
    folder.mkdir()
    (folder / "tales.tsv").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder
