"""Checks of output folders, and sizes as text."""

from pathlib import Path

import pytest

from hw3.common.disk import check_folder_is_new, check_writable, format_bytes
from hw3.common.errors import UserError


def test_check_folder_is_new_refuses_existing_folders_and_files(tmp_path: Path) -> None:
    check_folder_is_new(tmp_path / "new/folder", "OUTPUT=")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"already exists, and existing files are never overwritten; .* set OUTPUT=$"):
        check_folder_is_new(tmp_path, "OUTPUT=")


def test_check_writable_refuses_a_folder_inside_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"{file} is a file, but a folder is needed"):
        check_writable(file / "run")


def test_check_writable_refuses_names_that_libraries_would_encode_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "文")
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "big5")
    check_writable(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"/文: this locale encodes names in big5, .*; set PYTHONUTF8=1 in the environment"
    ):
        check_writable(tmp_path / "文")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 MiB"), (300 * 2**10, "0.3 MiB"), (2**27, "0.12 GiB"), (3 * 2**29, "1.50 GiB")]
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x" * 223, None),
        ("x" * 224, r"File name too long \(224 bytes, expected at most 223\)"),
        ("字" * 75, r"File name too long \(225 bytes"),
        ("x/" * 1920, r"File name too long \(a path of "),
        ("a\0b", "has a null character"),
        ("link", "link is a link to nothing"),
        ("link/x", "link is a link to nothing"),
    ],
    ids=range(7),
)
def test_check_writable_refuses_names_that_cannot_be_created(tmp_path: Path, name: str, problem: str | None) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for path, is_file in ((tmp_path / name, False), (tmp_path / name / "x", True)):
        if problem is None:
            check_writable(path, is_file=is_file)
        else:
            with pytest.raises(UserError, match=f"{problem}.*; set another one with RUN="):
                check_writable(path, is_file=is_file)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_check_writable_tries_file_systems_that_take_no_files() -> None:
    with pytest.raises(UserError, match=r"^/proc/run: /proc is not writable"):
        check_writable(Path("/proc/run"))
