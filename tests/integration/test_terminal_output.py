"""Every command prints names and ids of users safely, and on terminals that know few characters."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers import write_recipe

from hw3.cli import main

# Would color and clear a terminal, return to the beginning of the line, and reverse the text.
HOSTILE = "雨\x1b[31m\x1b[2J\r\u202e\u2066\x9b"
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mini_base: Path) -> Path:
    """Return a folder with a hostile name, and in it a recipe whose rows have hostile ids and texts."""
    folder = tmp_path_factory.mktemp("terminal") / f"of {HOSTILE}"
    folder.mkdir()
    recipe_file = write_recipe(folder, mini_base)
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8"))
    recipe["training"] |= {"max_steps": 2, "save_steps": 1}
    for key in "train", "eval":
        path = Path(recipe["data"][key])
        rows = json.loads(path.read_text(encoding="utf-8"))
        for number, row in enumerate(rows):
            row |= {"id": f"{HOSTILE}{number}", "instruction": row["instruction"] + HOSTILE}
        path.write_text(json.dumps(rows), encoding="utf-8")
    recipe_file.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return folder


@pytest.fixture(params=["ascii", "cp950", "utf-8"])
def encoding(request: pytest.FixtureRequest) -> str:
    """Return the encoding of a terminal; every test runs with each."""
    return request.param


@pytest.fixture
def run_command(encoding: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command with streams of an encoding; check that they got no control characters, and return the text."""

    def run(*arguments: str | Path, expected: int = 0) -> str:
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            status = main([str(argument) for argument in arguments])
        texts = []
        for stream in streams.values():
            stream.flush()
            texts.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
        text = "".join(texts)
        assert status == expected, text
        assert not (found := CONTROL_CHARACTERS.search(text)), text[found.start() - 100 : found.end() + 20]
        return text

    return run


def test_commands_print_hostile_names_as_escapes_in_every_encoding(
    folder: Path, run_command: Callable[..., str], tmp_path: Path
) -> None:
    recipe, run = folder / "mini/qlora.yaml", tmp_path / f"run {HOSTILE}"
    rows = folder / "eval.json"
    assert "\\u001b[31m" in run_command("check", recipe, "--run", run, "--show-masks", "1", "--no-time-estimate")
    assert "\\u202e" in run_command("train", recipe, "--run", run)
    run_command("eval", run)
    assert "\\u001b[2J" in run_command("predict", run)
    assert "\\u000d" in run_command("predict", run, "--checkpoint", "base")
    assert "\\u202e" in run_command("compare", run)
    assert "\\u202e" in run_command("compare", f"{run}/base", "--id", f"{HOSTILE}1")
    assert "no such row" in run_command("compare", run, "--id", f"{HOSTILE}none", expected=2)
    run_command("report", run)
    assert "\\u001b" in run_command("export", run)
    assert "\\u001b" in run_command("export", run, expected=2)
    assert "\\u001b" in run_command("data", "check", rows, folder / "train.json")
    columns = ["--columns", "id=id", "input=instruction", "output=output"]
    assert "\\u001b" in run_command("data", "rows", rows, "--output", tmp_path / f"{HOSTILE}.json", *columns)
    assert "no such run" in run_command("eval", tmp_path / HOSTILE, expected=2)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii"], indirect=True)
def test_pack_prints_hostile_names_as_escapes(folder: Path, run_command: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / f"run {HOSTILE}"
    run_command("train", folder / "mini/qlora.yaml", "--run", run)
    run_command("eval", run)
    assert "\\u001b" in run_command("pack", run, "--input", folder / "eval.json")


def test_errors_of_arguments_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["train", "a.yaml", f"--{HOSTILE}"],
        [HOSTILE],
        ["data", HOSTILE],
        ["check", "a", "--processes", HOSTILE],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        stderr = capsys.readouterr().err
        assert "[31m" in stderr and not CONTROL_CHARACTERS.search(stderr)
