"""`hw3 data check`: literal counts on rows written for these tests."""

import json
from pathlib import Path

import pytest
from helpers import REPOSITORY
from sample_corpus import write_row_file

from hw3.cli import main
from hw3.corpus.audit import audit_files


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_row_file(
        tmp_path / "train.json",
        [
            ("庭前老梅著花三朵，雪猶未消。\n翻譯成現代文：", "院子前面的老梅樹開了三朵花，雪還沒有融化。"),
            ("庭前老梅着花三朵雪猶未消\n翻譯成白話文：", "院子前面的老梅樹開了三朵花，雪還沒有融化。"),
            ("庭前老梅著花三朵，雪猶未化。\n翻譯成現代文：", "庭前的梅樹開花了，雪還在。"),
            ("翻譯成文言文：\n院子前面的老梅樹開了三朵花，雪還沒有融化。", "庭前老梅著花三朵，雪猶未消。"),
            ("文言文翻譯：\n雨止。", "答案：雨止。"),
            ("雨停了嗎？\n翻譯成文言文：", "雨止乎？<eos>"),
            ("问：汉字简体是什么？", "他说體育课取消了。"),
            ("風起□雲湧，山雨欲來。\n把這句話翻譯成現代文。", None),
        ],
    )


def read_report(files: list[Path], folder: Path, **options: Path) -> dict:
    """Audit files and return the JSON report."""
    assert audit_files(files, report_path=folder / "report.json", **options) == 0
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_audit_counts_findings_of_one_file(train: Path, tmp_path: Path) -> None:
    (file,) = read_report([train], tmp_path)["files"].values()
    assert (file["rows"], file["without_output"], file["short_outputs"]) == (8, 1, 1)
    assert file["duplicates"] == {
        "repeated_instructions": 0,
        "repeated_texts": 1,  # apart from punctuation and 着
        "repeated_pairs": 1,
        "reversed_pairs": 2,
        "near_duplicates": 3,
    }
    assert file["output_equals_input"] == {"exact": 1, "normalized": 1}
    assert file["characters"]["output"] == {"min": 6, "median": 13.0, "p95": 21.0, "max": 21}
    assert file["characters"]["text"]["min"] == 3
    assert file["tokens"] is None
    assert file["special_tokens_in_text"] == {"<eos>": 1}
    assert file["odd_characters"]["rows"] == 2
    assert file["odd_characters"]["most_frequent"]["U+25A1"] == 1
    scripts = file["scripts"]
    assert [scripts[kind] for kind in ("traditional", "simplified", "mixed", "undetermined")] == [6, 0, 1, 1]
    assert file["directions"] == {"m2c": 2, "c2m": 5, "unknown": 1, "templates": 6}


def test_audit_reports_median_and_p95_by_linear_interpolation(tmp_path: Path) -> None:
    rows = write_row_file(tmp_path / "rows.json", [(f"問{number}", "天" * (number + 1)) for number in range(10)])
    (file,) = read_report([rows], tmp_path)["files"].values()
    assert file["characters"]["output"] == {"min": 1, "median": 5.5, "p95": 9.55, "max": 10}


def test_audit_finds_leakage_on_either_side(train: Path, tmp_path: Path) -> None:
    rows = [
        ("庭前老梅着花三朵，雪犹未消！\n翻譯成現代文：", "別的譯文，與訓練所用完全不同。"),  # the same, simplified
        ("翻譯成古文：\n有人問：雨停了嗎？", "風起雲湧，山雨欲來"),  # the output is a text of train.json without □
        ("翻譯成古文：\n昨天院子前面的老梅樹開了三朵花，雪還沒有融化。", "昨日天寒。"),  # contains a text
        ("春去秋來。\n翻譯成現代文：", "春天過去，秋天到來。"),
    ]
    (pair,) = read_report([train, write_row_file(tmp_path / "test.json", rows)], tmp_path)["leakage"]
    assert pair == {
        "smaller_file": str(tmp_path / "test.json"),
        "larger_file": str(train),
        "rows": 4,
        "same": 2,
        "contained": 1,
        "near": 0,
        "both_sides": 0,
        "ids": ["test-0", "test-1", "test-2"],
    }


def test_audit_prints_warnings(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = write_row_file(tmp_path / "test.json", [("庭前老梅著花三朵，雪猶未消。\n翻譯成現代文：", "梅花開了。")])
    assert main(["data", "check", str(train), str(test)]) == 0
    printed = capsys.readouterr().out
    for line in (
        f"! {train}: 1 of 8 rows have no output: they can be predicted, but not trained on or scored",
        f"! {train}: 1 of 8 rows contain the text of a special token; it is encoded as ordinary text",
        f"! {train}: 1 of 8 rows mix simplified and traditional characters",
        f"! {train}: the directions are unbalanced: 2 modern to Classical, 5 Classical to modern",
        f"! leakage: 1 of 1 rows of {test} have a side that is also in {train} (1 the same, 0 one contained in the "
        "other, 0 near duplicates; 0 with both sides): test-0",
    ):
        assert line in printed.splitlines()


def test_audit_of_the_sample_rows_has_no_warnings_and_counts_the_recipes_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    files = [Path("data/train.json"), Path("data/eval.json")]
    report = read_report(files, tmp_path, recipe_path=Path("recipes/tiny/qlora.yaml"), plot_path=tmp_path / "rows.png")
    printed = capsys.readouterr().out
    assert "no row of data/eval.json has a side that is also in data/train.json" in printed
    assert report["warnings"] == []
    tokens = report["files"]["data/eval.json"]["tokens"]
    # One token per character, and EOS.
    longest = report["files"]["data/eval.json"]["characters"]["output"]["max"]
    assert tokens["output"]["max"] == longest + 1 == 80
    assert (tokens["over_max_length"], tokens["unknown_in_prompts"], tokens["unknown_in_outputs"]) == (0, 0, 0)
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"


def test_audit_names_the_bad_rows_of_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('[{"id": "1", "instruction": 3}]', encoding="utf-8")
    assert main(["data", "check", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    stderr = capsys.readouterr().err
    assert "a.json: row 1 (id 1): instruction is a number" in stderr
    assert "b.json: no such file" in stderr
