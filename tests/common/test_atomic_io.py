"""Atomic writes: content, permissions, and nothing left behind."""

import json
import os
from pathlib import Path

from hw3.common.atomic_io import apply_umask, write_atomically, write_json, write_json_rows


def test_write_atomically_replaces_the_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new/file.txt"
    write_atomically(path, "一\n")
    write_atomically(path, "二\n")
    assert path.read_text(encoding="utf-8") == "二\n"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_write_json_and_write_json_rows_keep_chinese_readable(tmp_path: Path) -> None:
    rows = [{"id": "a", "output": "乙"}, {"id": "b", "output": "丙"}]
    write_json(tmp_path / "value.json", {"rows": 2})
    assert (tmp_path / "value.json").read_text(encoding="utf-8") == '{\n  "rows": 2\n}\n'
    write_json_rows(tmp_path / "rows.json", rows)
    text = (tmp_path / "rows.json").read_text(encoding="utf-8")
    assert text == '[\n{"id": "a", "output": "乙"},\n{"id": "b", "output": "丙"}\n]\n'
    assert json.loads(text) == rows


def test_apply_umask_lets_others_read_files(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.touch(mode=0o600)
    before = os.umask(0o022)
    try:
        apply_umask(tmp_path)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644
