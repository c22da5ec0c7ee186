"""Commands in messages can be pasted into the shell that the program was called from."""

import shutil
import sys
from pathlib import Path

import pytest

from hw3.common.shell_commands import hw3_command, installed_command, next_command


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose environment has `hw3`, which is not on the PATH, and the working directory is the project."""
    scripts = tmp_path / "my project/.venv/bin"
    scripts.mkdir(parents=True)
    for name in ("python", "hw3", "accelerate"):
        (scripts / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("MAKELEVEL", raising=False)
    monkeypatch.chdir(tmp_path / "my project")
    return scripts


def test_command_has_the_path_of_an_environment_that_is_not_activated(environment: Path) -> None:
    assert shutil.which("hw3") is None
    assert hw3_command("data", "check", Path("my rows.json")) == ".venv/bin/hw3 data check 'my rows.json'"
    assert installed_command("accelerate", "launch") == ".venv/bin/accelerate launch"


def test_command_has_only_the_name_of_a_program_on_the_path(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin:/bin")
    assert hw3_command("report", "outputs/a") == "hw3 report outputs/a"


def test_command_has_no_path_outside_of_the_working_directory(
    environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert hw3_command("report", "a") == "hw3 report a"


def test_next_command_is_that_of_the_makefile_inside_make(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next_command("eval", Path("outputs/my run")) == ".venv/bin/hw3 eval 'outputs/my run'"
    monkeypatch.setenv("MAKELEVEL", "1")
    assert next_command("eval", Path("outputs/my run")) == "make eval RUN='outputs/my run'"
