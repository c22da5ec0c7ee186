"""The tools around the sample rows, run as a user runs them, and the rows that the project ships."""

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY as ROOT


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / name, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def write_pairs(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    (folder / "tales.tsv").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def test_the_shipped_rows_are_what_the_pairs_give(tmp_path: Path) -> None:
    built = run_tool("build_sample.py", "--pairs", ROOT / "data/pairs", "--out", tmp_path)
    assert built.returncode == 0, built.stderr
    for name, fewest in (("train.json", 500), ("eval.json", 100)):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()
        assert len(json.loads((tmp_path / name).read_text(encoding="utf-8"))) >= fewest


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", "雨止。", "雨止。\t雨停了 OK。", "雪深。\t雪深。", "雨止。\t雨停了。")
    built = run_tool("build_sample.py", "--pairs", pairs, "--out", tmp_path)
    assert built.returncode == 2
    assert built.stderr == (
        "tales.tsv:1: expected Classical<TAB>modern, found 1 column(s): '雨止。'\n"
        "tales.tsv:2: neither Chinese characters nor full-width punctuation: [' ', 'K', 'O']\n"
        "tales.tsv:3: both sides are the same: 雪深。\n"
        "tales.tsv:4: as in tales.tsv:2: 雨止。\n"
    )
    assert not (tmp_path / "train.json").exists()


def test_a_sentence_in_both_files_is_refused(tmp_path: Path) -> None:
    numbers = "一二三四五六七八九十百千萬"
    lines = [f"{n}山之雪未消也。\t{n}山的雪還沒有融化完。夜裡又下起了大雪。" for n in numbers]
    built = run_tool("build_sample.py", "--pairs", write_pairs(tmp_path / "pairs", *lines), "--out", tmp_path)
    assert built.returncode == 2
    assert "(eval) share: 夜裡又下起了大雪" in built.stderr
    assert not (tmp_path / "train.json").exists()


@pytest.mark.parametrize(
    ("modern", "form"),
    [("他走出門外，面向東邊站著，笑了。", "with punctuation"), ("他走出門外面向東邊站著笑了！", "without punctuation")],
)
def test_another_spelling_of_a_homework_row_is_found(tmp_path: Path, modern: str, form: str) -> None:
    pytest.importorskip("ahocorasick")
    pairs = write_pairs(tmp_path / "pairs", f"出門，東向立而笑。\t{modern}")
    row = {"id": "1", "instruction": "翻譯成文言文：\n那天他走齣門外，麵嚮東邊站著，笑瞭。", "output": "某日出。"}
    (tmp_path / "train.json").write_text(json.dumps([row]), encoding="utf-8")
    (tmp_path / "public_test.json").write_text("[]", encoding="utf-8")
    (tmp_path / "pairs-00.tsv.xz").write_bytes(lzma.compress("某书\t某日出。\t某天他出门。\n".encode()))
    report = tmp_path / "report.json"
    folders = ["--pairs", pairs, "--homework", tmp_path, "--corpus", tmp_path, "--out", report]
    checked = run_tool("check_sample.py", *folders)
    assert checked.returncode == 1, checked.stderr
    assert f"tales-001 modern stands in homework/train.json ({form})" in checked.stdout
    found = json.loads(report.read_text(encoding="utf-8"))["matches"][form.replace(" ", "_")]
    assert found == [{"side": "tales-001 modern", "source": "homework/train.json"}]


def test_absent_collections_are_named(tmp_path: Path) -> None:
    pytest.importorskip("ahocorasick")
    pairs = write_pairs(tmp_path / "pairs", "雨止。\t雨停了。")
    checked = run_tool("check_sample.py", "--pairs", pairs, "--homework", tmp_path, "--corpus", tmp_path)
    assert checked.returncode == 2
    assert "train.json" in checked.stderr
    assert "pairs-0*.tsv.xz" in checked.stderr
