"""Every command refuses a place where it cannot write, or a name that no file can have: status 2 and one message.

Nothing is written.
"""

import lzma
from pathlib import Path

import pytest
from helpers import REPOSITORY, hw3

# Stand for the arguments of a command: OUTPUT is the place, RUN a scored run, and the others are its inputs.
COMMANDS = {
    "train": ["train", "RECIPE", "--run", "OUTPUT"],
    "check": ["check", "RECIPE", "--run", "OUTPUT", "--no-time-estimate"],
    "eval": ["eval", "OUTPUT", "--recipe", "RECIPE", "--checkpoint", "base"],
    "predict": ["predict", "RUN", "ROWS", "--output", "OUTPUT"],
    "report": ["report", "RUN", "--output", "OUTPUT"],
    "pack": ["pack", "RUN", "--output", "OUTPUT"],
    "export": ["export", "RUN", "--output", "OUTPUT"],
    "search": ["search", "RECIPE", "SPACE", "--output", "OUTPUT"],
    "build": ["data", "build", "--corpus", "CORPUS", "--output", "OUTPUT"],
    "rows": ["data", "rows", "ROWS", "--columns", "input=instruction", "output=output", "--output", "OUTPUT"],
    "data-check": ["data", "check", "ROWS", "--output", "OUTPUT"],
    "plot": ["data", "check", "ROWS", "--plot", "OUTPUT"],
}
PLACES = {
    "below a file": "file/x",
    "below a folder below a file": "file/x/y",
    "procfs": "/proc/x",
    "below a folder in procfs": "/proc/x/y",
    "device": "/dev/full",
    "below a device": "/dev/full/x",
    "name of 256 bytes": "x" * 256,
    "name of 258 bytes": "字" * 86,
    "below a name of 256 bytes": "x" * 256 + "/y",
    "path of 5000 bytes": ("x" * 199 + "/") * 25,
    "link to nothing": "dangling",
    "below a link to nothing": "dangling/x",
    "link to itself": "loop",
    "null character": "a\0b",
    "line end below a file": "file/a\nb",
}
# Commands with the name of an input, NAME.
READING_COMMANDS = {
    "train": ["train", "NAME"],
    "train, data": ["train", "RECIPE", "--run", "new", "data.train=NAME"],
    "train, base": ["train", "RECIPE", "--run", "new", "model.pretrained_model_name_or_path=NAME"],
    "train, prompt": ["train", "RECIPE", "--run", "new", "prompt=NAME"],
    "check": ["check", "RECIPE", "--accelerate", "NAME"],
    "eval": ["eval", "NAME"],
    "eval, data": ["eval", "RUN", "--data", "NAME"],
    "eval, prompt": ["eval", "RUN", "--prompt", "NAME"],
    "eval, adapter": ["eval", "RUN", "--adapter", "NAME"],
    "predict": ["predict", "NAME", "ROWS"],
    "predict, rows": ["predict", "RUN", "NAME"],
    "predict, checkpoint": ["predict", "RUN", "ROWS", "--checkpoint", "NAME"],
    "compare": ["compare", "NAME"],
    "report": ["report", "NAME"],
    "pack": ["pack", "NAME"],
    "export": ["export", "NAME"],
    "verify": ["verify", "NAME"],
    "search": ["search", "NAME", "SPACE"],
    "search, space": ["search", "RECIPE", "NAME"],
    "build": ["data", "build", "--corpus", "NAME", "--output", "new"],
    "rows": ["data", "rows", "NAME", "--columns", "input=instruction", "output=output", "--output", "new.json"],
    "data-check": ["data", "check", "NAME"],
}
NAMES = ("x" * 256, ("x" * 199 + "/") * 25, "a\0b", "a\nb", "loop", "file/x", "/proc/x", "")


def list_tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def values(
    tmp_path: Path, mini_recipe: Path, scored_run: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str | Path]:
    """Change to a folder with a file, links and a corpus; return what the words of a command stand for."""
    (tmp_path / "file").write_text("content")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere/x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.tsv.xz").write_bytes(lzma.compress("書\t今日無雨。\t今天沒有下雨。\n".encode()))
    monkeypatch.chdir(tmp_path)
    space = REPOSITORY / "recipes/search/tiny.yaml"
    rows = scored_run.parent / "eval.json"
    return {"RECIPE": mini_recipe, "RUN": scored_run, "ROWS": rows, "CORPUS": corpus, "SPACE": space}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_command_refuses_a_place_where_it_cannot_write(
    command: str, place: str, values: dict[str, str | Path], tmp_path: Path, scored_run: Path
) -> None:
    values["OUTPUT"] = PLACES[place]
    before = list_tree(tmp_path), list_tree(scored_run)
    stdout, stderr = hw3(*(values.get(word, word) for word in COMMANDS[command]), expected=2)
    assert stdout == "" and "Traceback" not in stderr
    assert (list_tree(tmp_path), list_tree(scored_run)) == before
    assert stderr.startswith("hw3: ") and len(stderr.splitlines()) == 1
    name = PLACES[place].replace("\n", "\\u000a").replace("\0", "\\u0000")
    assert name[:150] in stderr


@pytest.mark.parametrize("command", READING_COMMANDS)
def test_command_refuses_an_input_that_cannot_be_there(
    command: str, values: dict[str, str | Path], tmp_path: Path, scored_run: Path
) -> None:
    before = list_tree(tmp_path), list_tree(scored_run)
    for name in NAMES:
        words = [str(values.get(word, word)).replace("NAME", name) for word in READING_COMMANDS[command]]
        _, stderr = hw3(*words, expected=2)
        assert "hw3: " in stderr and "Traceback" not in stderr, name
        assert (list_tree(tmp_path), list_tree(scored_run)) == before, name
