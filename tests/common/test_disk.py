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


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 MiB"), (300 * 2**10, "0.3 MiB"), (2**27, "0.12 GiB"), (3 * 2**29, "1.50 GiB")]
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text
