"""`hw3 report` as a command: same bytes for the same files, and refusals that write nothing."""

import os
from pathlib import Path

from helpers import hw3
from sample_runs import write_and_read_report, write_run


def test_same_files_give_the_same_bytes() -> None:
    run = write_run(Path("outputs/a"))
    write_and_read_report(run)
    before = {name: (run / name).read_bytes() for name in ("report.html", "report.md")}
    (run / "report.html").write_text("old", encoding="utf-8")
    write_and_read_report(run)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


def test_mistakes_are_refused_and_nothing_is_written() -> None:
    run = write_run(Path("outputs/a"))
    assert "outputs/none: no such run" in "".join(hw3("report", run, "outputs/none", expected=2))
    message = "".join(hw3("report", run, "outputs/../outputs/a", expected=2))
    assert "outputs/a: the run is named twice" in message.replace("../outputs/", "")
    Path("file").write_text("", encoding="utf-8")
    assert "file: is a file" in "".join(hw3("report", run, "--output", "file", expected=2))
    (run / "eval/eval/results.json").write_text("{", encoding="utf-8")
    assert "results.json: cannot be read" in "".join(hw3("report", run, expected=2))
    assert not (run / "report.html").exists()


def test_report_refuses_to_replace_what_is_no_file() -> None:
    run, folder = write_run(Path("outputs/a")), Path("pages")
    folder.mkdir()
    os.mkfifo(folder / "report.md")
    assert "report.md: is not a regular file" in "".join(hw3("report", run, "--output", folder, expected=2))
    assert [path.name for path in folder.iterdir()] == ["report.md"]
