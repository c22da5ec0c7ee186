"""The manifest's JSON form."""

import json
from pathlib import Path

import pytest

from hw3.runs.manifest import Manifest, Session, git_commit


def test_session_leaves_out_absent_memory() -> None:
    session = Session(started="2026-01-02T03:04:05+00:00", seconds=1.5, from_step=0, to_step=12, processes=1)
    assert json.loads(session.to_json()) == {
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 1.5,
        "from_step": 0,
        "to_step": 12,
        "processes": 1,
    }
    assert json.loads(session.model_copy(update={"peak_gib": 0.5}).to_json())["peak_gib"] == 0.5


def test_manifest_is_byte_equal_after_reading_and_writing(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == manifest
    assert Manifest.read(tmp_path / "manifest.json").to_json() == (tmp_path / "manifest.json").read_text(
        encoding="utf-8"
    )


def test_git_commit_comes_from_the_environment_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert git_commit() == "abc"
