"""Parsing of the command line: strict options, and positional arguments after options."""

import logging
import os
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, REPOSITORY

from hw3 import __version__
from hw3.cli import _build_parser, _parse, main


@pytest.mark.parametrize(
    "arguments", [["train"], ["trian", "x.yaml"], ["train", "x.yaml", "--runn", "y"], ["eval", "x", "a=b"]]
)
def test_unknown_commands_and_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_options_cannot_be_abbreviated() -> None:
    with pytest.raises(SystemExit):
        _parse(_build_parser(), ["eval", "run", "--base"])


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["train", "x.yaml", "lora.r=4", "--run", "y", "lora.r=8"], ["lora.r=4", "lora.r=8"]),
        (
            ["predict", "run", "--shots", "1", "rows.json", "generation.num_beams=2"],
            ["rows.json", "generation.num_beams=2"],
        ),
        (["predict", "run", "--shots", "1", "-"], ["-"]),
    ],
)
def test_overrides_and_the_file_to_predict_may_follow_options(arguments: list[str], overrides: list[str]) -> None:
    assert _parse(_build_parser(), arguments).overrides == overrides


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hw3 {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        (["--quiet", "eval", "run"], logging.WARNING),
        (["eval", "run", "--quiet"], logging.WARNING),
        (["data", "check", "rows.json", "--verbose"], logging.DEBUG),
    ],
)
def test_verbosity_may_stand_before_and_after_the_command(arguments: list[str], level: int) -> None:
    assert _parse(_build_parser(), arguments).log_level == level


@pytest.mark.parametrize("arguments", [["--help"], ["data", "check", "data/eval.json"]])
def test_closed_pipe_ends_a_command_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "hw3", *arguments], stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT,
        cwd=REPOSITORY,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode in (0, 143) and done.stderr == b""
