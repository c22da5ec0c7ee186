"""Paths in result files and in messages."""

from pathlib import Path

import pytest

from hw3.common.paths import portable_path, shown_path


def test_paths_inside_the_working_directory_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "outputs" / "a.json"
    assert portable_path(path) == shown_path(path) == shown_path(Path("outputs/a.json")) == "outputs/a.json"


def test_other_paths_are_complete_in_messages_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path.parent / "run" / "base.json"
    assert portable_path(path) == "base.json"
    assert shown_path(path) == str(path)


def test_messages_show_a_linked_folder_by_the_name_of_the_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "drive").mkdir()
    (here / "outputs").symlink_to(tmp_path / "drive")
    monkeypatch.chdir(here)
    assert shown_path(Path("outputs/report.html")) == "outputs/report.html"
