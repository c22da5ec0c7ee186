"""The command line on systems and installations where no command can work."""

import subprocess
import sys
from pathlib import Path

from helpers import ENVIRONMENT, REPOSITORY

# The modules that behave differently on Windows are imported before `sys.platform` is changed.
ON_WINDOWS = """
import importlib.metadata, pathlib, shutil, signal, socket, subprocess, sys, tempfile
del signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
sys.platform = "win32"
from hw3.cli import main
sys.exit(main(["doctor"]))
"""


def test_windows_itself_is_refused_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_WINDOWS], capture_output=True, text=True, env=ENVIRONMENT, cwd=REPOSITORY
    )
    message = "hw3: does not run on Windows itself; use the Windows Subsystem for Linux: wsl --install\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_a_package_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('libcudart.so: not found')", encoding="utf-8")
    command = [sys.executable, "-m", "hw3", "train", "recipes/tiny/qlora.yaml", "--run", str(tmp_path / "run")]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("hw3: ImportError: libcudart.so: not found; to see which package is broken, run ")
    assert done.stderr.endswith(" doctor\n") and done.stderr.count("\n") == 1
