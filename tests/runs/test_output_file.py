"""`--output` and `--plot` never replace an input, a file of a run, or something that is no regular file."""

import json
import os
import socket
from pathlib import Path

import pytest
from helpers import write_rows

from hw3.cli import main
from hw3.common.atomic_io import write_atomically
from hw3.common.errors import RunError, UserError
from hw3.runs.output_file import check_output_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with rows, links to them, a run, and things that are no regular files."""
    write_rows(tmp_path / "rows.json", 3)
    (tmp_path / "link.json").symlink_to("rows.json")
    os.link(tmp_path / "rows.json", tmp_path / "hard.json")
    (tmp_path / "away").symlink_to(tmp_path)
    for name in ("recipe.yaml", "manifest.json", "tokenizer/a", "checkpoint-100/COMPLETE.json", "eval/a/results.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}", encoding="utf-8")
    (tmp_path / "old.json").write_text("old", encoding="utf-8")
    (tmp_path / "to-old.json").symlink_to("old.json")
    (tmp_path / "to-nothing.json").symlink_to("nothing.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.json", "is the input"),
        ("link.json", "is the input"),
        ("hard.json", "is the input"),
        ("away/rows.json", "is the input"),
        ("base/config.json", "is the input"),
        ("rows.json/new.json", "rows.json is a file, but a folder is needed; set another one with --output"),
        ("loop.json", "is not a regular file"),
        ("x" * 300, "cannot be written: File name too long"),
        ("pipe", "is not a regular file"),
        ("null", "is not a regular file"),
        ("socket", "is not a regular file"),
        ("to-nothing.json", "is not a regular file"),
        ("run", "is a folder; give the name of a file"),
        ("run/recipe.yaml", "belongs to the run"),
        ("run/Manifest.json", "belongs to the run"),
        ("away/run/manifest.json", "belongs to the run"),
        ("run/tokenizer/a", "belongs to the run"),
        ("run/checkpoint-100/COMPLETE.json", "belongs to the run"),
        ("run/checkpoint-100/new.json", "belongs to the run"),
        ("run/eval/a/results.json", "belongs to the run"),
        ("run/predictions/a/base.json", "belongs to the run"),
    ],
)
def test_check_output_file_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(folder)
    Path("base").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(UserError, match=f"(--output {name}|^rows.json): {message}"):
            check_output_file(Path(name), "--output", [Path("rows.json"), Path("base"), Path("none.json")])


@pytest.mark.parametrize("name", ["new.json", "new/new.json", "old.json", "to-old.json", "run/mine.json", "evaluation"])
def test_check_output_file_accepts(folder: Path, name: str) -> None:
    check_output_file(folder / name, "--output", [folder / "rows.json"])


def test_write_atomically_writes_the_target_of_a_link_and_refuses_a_device(folder: Path) -> None:
    write_atomically(folder / "to-old.json", "new")
    assert (folder / "to-old.json").is_symlink() and (folder / "old.json").read_text(encoding="utf-8") == "new"
    for name in ("pipe", "null", "to-nothing.json", "run"):
        with pytest.raises(UserError):
            write_atomically(folder / name, "new")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    with pytest.raises(RunError, match=r"^/proc/new\.json: cannot be written: No such file or directory"):
        write_atomically(Path("/proc/new.json"), "new")


def test_data_check_refuses_to_write_where_it_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = Path("rows.json").read_bytes()
    for option in "--output", "--plot":
        assert main(["data", "check", "rows.json", option, "away/rows.json"]) == 2
        assert f"{option} away/rows.json: is the input rows.json" in capsys.readouterr().err
    assert main(["data", "check", "rows.json", "--output", "pipe", "--plot", "run/recipe.yaml"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert main(["data", "check", "rows.json", "--output", "a", "--plot", "a"]) == 2
    assert "--output and --plot: both are a; give two files" in capsys.readouterr().err
    assert Path("rows.json").read_bytes() == before
    assert main(["data", "check", "rows.json", "--output", "to-old.json"]) == 0
    assert json.loads(Path("old.json").read_text(encoding="utf-8"))["schema"] == 1
