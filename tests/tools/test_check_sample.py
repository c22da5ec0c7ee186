"""`tools/check_sample.py`: matches in another spelling, and missing collections."""

import json
import lzma
from pathlib import Path

import pytest
from tool_runs import run_tool, write_pairs

pytest.importorskip("ahocorasick")


@pytest.mark.parametrize(
    ("modern", "form"),
    [("他走出門外，面向東邊站著，笑了。", "with punctuation"), ("他走出門外面向東邊站著笑了！", "without punctuation")],
)
def test_check_sample_finds_another_spelling_of_a_homework_row(tmp_path: Path, modern: str, form: str) -> None:
    pairs = write_pairs(tmp_path / "pairs", f"出門，東向立而笑。\t{modern}")
    row = {"id": "1", "instruction": "翻譯成文言文：\n那天他走齣門外，麵嚮東邊站著，笑瞭。", "output": "某日出。"}
    (tmp_path / "train.json").write_text(json.dumps([row]), encoding="utf-8")
    (tmp_path / "public_test.json").write_text("[]", encoding="utf-8")
    (tmp_path / "pairs-00.tsv.xz").write_bytes(lzma.compress("某书\t某日出。\t某天他出门。\n".encode()))
    report = tmp_path / "report.json"
    arguments = ["--pairs", pairs, "--homework", tmp_path, "--corpus", tmp_path, "--output", report]
    completed = run_tool("check_sample.py", *arguments)
    assert completed.returncode == 1, completed.stderr
    assert f"tales-001 modern occurs in homework/train.json ({form})" in completed.stdout
    matches = json.loads(report.read_text(encoding="utf-8"))["matches"][form.replace(" ", "_")]
    assert matches == [{"side": "tales-001 modern", "source": "homework/train.json"}]


def test_check_sample_names_missing_collections(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", "雨止。\t雨停了。")
    completed = run_tool("check_sample.py", "--pairs", pairs, "--homework", tmp_path, "--corpus", tmp_path)
    assert completed.returncode == 2
    assert "train.json" in completed.stderr
    assert "pairs-0*.tsv.xz" in completed.stderr
