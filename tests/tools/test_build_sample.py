"""`tools/build_sample.py`: the committed sample rows, and pairs that it refuses."""

import json
from pathlib import Path

from helpers import REPOSITORY
from tool_runs import run_tool, write_pairs


def test_build_sample_reproduces_the_committed_rows(tmp_path: Path) -> None:
    completed = run_tool("build_sample.py", "--pairs", REPOSITORY / "data/pairs", "--output", tmp_path)
    assert completed.returncode == 0, completed.stderr
    for name, min_rows in (("train.json", 500), ("eval.json", 100)):
        assert (tmp_path / name).read_bytes() == (REPOSITORY / "data" / name).read_bytes()
        assert len(json.loads((tmp_path / name).read_text(encoding="utf-8"))) >= min_rows


def test_build_sample_names_every_bad_line(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", "雨止。", "雨止。\t雨停了 OK。", "雪深。\t雪深。", "雨止。\t雨停了。")
    completed = run_tool("build_sample.py", "--pairs", pairs, "--output", tmp_path)
    assert completed.returncode == 2
    assert completed.stderr == (
        "tales.tsv:1: expected Classical<TAB>modern, found 1 column(s): '雨止。'\n"
        "tales.tsv:2: neither Chinese characters nor full-width punctuation: [' ', 'K', 'O']\n"
        "tales.tsv:3: both sides are the same: 雪深。\n"
        "tales.tsv:4: as in tales.tsv:2: 雨止。\n"
    )
    assert not (tmp_path / "train.json").exists()


def test_build_sample_refuses_a_sentence_in_both_files(tmp_path: Path) -> None:
    numbers = "一二三四五六七八九十百千萬"
    lines = [f"{n}山之雪未消也。\t{n}山的雪還沒有融化完。夜裡又下起了大雪。" for n in numbers]
    pairs = write_pairs(tmp_path / "pairs", *lines)
    completed = run_tool("build_sample.py", "--pairs", pairs, "--output", tmp_path)
    assert completed.returncode == 2
    assert "(eval) share: 夜裡又下起了大雪" in completed.stderr
    assert not (tmp_path / "train.json").exists()
