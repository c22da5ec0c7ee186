"""`hw3 predict` for one text, and for lines of a pipe or a terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY, hw3

from hw3.generation.generator import RunGenerator
from hw3.generation.interactive import is_interactive, split_input_and_overrides

pytestmark = pytest.mark.usefixtures("in_repository")


def test_predict_lines_translates_one_text_and_every_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = hw3("predict", run, "--text", "今日無雨。", "--direction", "c2m")
    assert stdout.endswith("\n") and stdout.count("\n") == 1 and len(stdout) > 2
    assert "the best of those scored" in stderr  # standard output has only the translation
    assert hw3("predict", run, "--text", "今日無雨。\n翻譯成現代文：")[0] == stdout
    assert hw3("predict", run, "--text", "今日無雨。", "--template", "{x}\\n翻譯成現代文：")[0] == stdout
    to_classical = hw3("predict", run, "--text", "今天沒有下雨。", "--direction", "m2c")[0]
    assert to_classical == hw3("predict", run, "--text", "今天沒有下雨。\n翻譯成文言文：")[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("今日無雨。\n\n今日無雨。\n"))
    assert hw3("predict", run, "-", "--direction", "c2m")[0] == f"{stdout}\n{stdout}"


def test_predict_reads_utf8_lines_and_keeps_control_characters_of_outputs_for_a_pipe(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "\ufeff今日無雨。\r\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))
    asked = []

    def generate_text(self: RunGenerator, text: str) -> str:
        asked.append(text)
        return "雨\u200d\x1b\n停"

    monkeypatch.setattr("hw3.generation.generator.RunGenerator.generate_text", generate_text)
    assert hw3("predict", run, "-")[0] == "雨\u200d\x1b 停\n"
    assert asked == ["今日無雨。"]


def test_predict_reads_a_pipe_without_further_arguments(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (read_end, write_end), original_stdin = os.pipe(), os.dup(0)
    os.write(write_end, "今日無雨。\n翻譯成現代文：\n".encode())
    os.close(write_end)
    os.dup2(read_end, 0)
    try:
        with open(read_end, encoding="utf-8") as lines:
            monkeypatch.setattr("sys.stdin", lines)
            assert hw3("predict", run)[0].count("\n") == 2
            assert "standard input: no lines; give lines, a FILE of rows, or --text" in hw3(
                "predict", run, expected=2
            )[1]  # fmt: skip
    finally:
        os.dup2(original_stdin, 0)
        os.close(original_stdin)


def test_predict_shows_a_prompt_sign_on_a_terminal(run: Path) -> None:
    controller, terminal = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "hw3", "predict", str(run), "--direction", "c2m"],
        stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL,
        env=ENVIRONMENT | {"TERM": "dumb"}, cwd=REPOSITORY,
    ) as process:  # fmt: skip
        os.close(terminal)
        shown = b""
        while b"> " not in shown:
            shown += os.read(controller, 1000)
        os.write(controller, "今日無雨。\n".encode())
        while shown.count(b"> ") < 2:
            shown += os.read(controller, 1000)
        os.write(controller, b"\x04")
        assert process.wait(timeout=60) == 0
    lines = shown.decode().replace("\r", "").split("\n")
    assert lines[0] == "> 今日無雨。" and len(lines) == 3 and lines[2].startswith("> ")


def test_is_interactive_with_text_options_or_a_dash() -> None:
    no_options = {"text": None, "direction": None, "template": None}
    assert is_interactive(Path("-"), None, **no_options)
    assert is_interactive(None, None, **no_options | {"direction": "m2c"})
    assert not is_interactive(Path("rows.json"), None, **no_options)
    assert not is_interactive(None, Path("out.json"), **no_options)


def test_split_input_and_overrides_recognizes_files(tmp_path: Path) -> None:
    assert split_input_and_overrides(["a.json", "generation.num_beams=2"]) == (
        Path("a.json"),
        ["generation.num_beams=2"],
    )
    assert split_input_and_overrides(["-"]) == (Path("-"), [])
    (tmp_path / "a=b.json").touch()
    assert split_input_and_overrides([str(tmp_path / "a=b.json")]) == (tmp_path / "a=b.json", [])
