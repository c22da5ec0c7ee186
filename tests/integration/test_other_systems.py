"""What differs on other systems: how processes start, and the locale's encoding."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY

# macOS starts data workers with `spawn`, which has to send them the rows and the collator.
TRAIN_WITH_WORKERS = """
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from hw3.cli import main
    recipe, folder = sys.argv[1:]
    for workers in ("0", "1"):
        options = ["training.max_steps=2", f"training.dataloader_num_workers={workers}"]
        assert main(["train", recipe, "--run", f"{folder}/{workers}", *options]) == 0
"""

# With `-X warn_default_encoding` Python reports each file that is opened with the locale's encoding.
EVERY_COMMAND = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"hw3\\.")
from hw3.cli import main
recipe, run, rows = sys.argv[1:]
for command in (
    ["check", recipe], ["train", recipe, "--run", run, "training.max_steps=1"], ["eval", run], ["predict", run, rows],
    ["compare", run, "--data", rows], ["report", run], ["verify", run], ["data", "check", rows],
):
    assert main(command) == 0, command
"""


def run_script(
    folder: Path, code: str, *arguments: str | Path, options: tuple[str, ...] = (), **environment: str
) -> str:
    """Run a script in a process; return what it prints."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *options, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        cwd=REPOSITORY,
        env=ENVIRONMENT | environment,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_data_workers_that_are_spawned_do_not_change_the_adapter(mini_recipe: Path, tmp_path: Path) -> None:
    run_script(tmp_path, TRAIN_WITH_WORKERS, mini_recipe, tmp_path)
    first, second = (tmp_path / workers / "checkpoint-2/adapter_model.safetensors" for workers in ("0", "1"))
    assert first.read_bytes() == second.read_bytes()


def test_every_command_works_in_a_locale_without_chinese(mini_recipe: Path, tmp_path: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    output = run_script(
        tmp_path, EVERY_COMMAND, mini_recipe, tmp_path / "run", tmp_path / "eval.json",
        options=("-X", "warn_default_encoding", "-W", "ignore"), **ascii_only,
    )  # fmt: skip
    assert output.isascii() and "\\u7384" in output  # 玄, which the base model has learned nothing about
    assert "玄" in (tmp_path / "run/report.md").read_text(encoding="utf-8")
