"""`hw3 data check` and `hw3 data rows`: literal counts on rows written for these tests, files in every format."""

import json
from pathlib import Path

import pytest
from helpers import REPOSITORY

from hw3.cli import main
from hw3.corpus.audit import check_files
from hw3.data.rows import read_rows


def write(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    records = [
        {"id": f"{path.stem}-{number}", "instruction": instruction} | ({} if output is None else {"output": output})
        for number, (instruction, output) in enumerate(rows)
    ]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(
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


def figures_of(files: list[Path], folder: Path, **options: Path) -> dict:
    assert check_files(files, report=folder / "report.json", **options) == 0
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_counts_of_one_file(train: Path, tmp_path: Path) -> None:
    (file,) = figures_of([train], tmp_path)["files"].values()
    assert (file["rows"], file["without_output"], file["short_outputs"]) == (8, 1, 1)
    assert file["duplicates"] == {
        "same_instruction": 0,
        "same_text": 1,  # but for punctuation and 着
        "same_text_and_output": 1,
        "both_directions": 2,
        "near_text": 3,
    }
    assert file["output_equals_input"] == {"exactly": 1, "but_for_script_and_punctuation": 1}
    assert file["characters"]["output"] == {"least": 6, "median": 13, "p95": 21, "most": 21}
    assert file["characters"]["text"]["least"] == 3
    assert file["special_tokens_in_text"] == {"<eos>": 1}
    assert file["odd_characters"]["rows"] == 2
    assert file["odd_characters"]["most"]["U+25A1"] == 1
    scripts = file["scripts"]
    assert [scripts[kind] for kind in ("traditional", "simplified", "mixed", "either")] == [6, 0, 1, 1]
    assert file["directions"] == {"m2c": 2, "c2m": 5, "other": 1, "wordings": 6}


def test_leakage_between_files_on_either_side(train: Path, tmp_path: Path) -> None:
    rows = [
        ("庭前老梅着花三朵，雪犹未消！\n翻譯成現代文：", "別的譯文，與訓練所用完全不同。"),  # the same, simplified
        (
            "翻譯成古文：\n有人問：雨停了嗎？",
            "風起雲湧，山雨欲來",
        ),  # the output is a text to predict there, less a mark
        ("翻譯成古文：\n昨天院子前面的老梅樹開了三朵花，雪還沒有融化。", "昨日天寒。"),  # one inside the other
        ("春去秋來。\n翻譯成現代文：", "春天過去，秋天到來。"),
    ]
    (pair,) = figures_of([train, write(tmp_path / "test.json", rows)], tmp_path)["between"]
    assert pair == {
        "small": str(tmp_path / "test.json"),
        "large": str(train),
        "rows": 4,
        "same": 2,
        "inside": 1,
        "near": 0,
        "both_sides": 0,
        "ids": ["test-0", "test-1", "test-2"],
    }


def test_notes_name_what_is_worth_a_look(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = write(tmp_path / "test.json", [("庭前老梅著花三朵，雪猶未消。\n翻譯成現代文：", "梅花開了。")])
    assert main(["data", "check", str(train), str(test)]) == 0
    shown = capsys.readouterr().out
    for line in (
        f"! {train}: 1 of 8 rows have no output: rows to predict, not to train on or score",
        f"! {train}: 1 of 8 rows have a special token spelled out; it stays text",
        f"! {train}: 1 of 8 rows mix simplified and traditional characters",
        f"! {train}: the directions are out of balance: 2 modern to Classical, 5 Classical to modern",
        f"! leakage: 1 of 1 rows of {test} have a side that stands in {train} (1 the same, 0 one inside the other, "
        "0 nearly; 0 with both sides): test-0",
    ):
        assert line in shown.splitlines()


def test_the_samples_are_clean_and_tokens_are_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    files = [Path("data/train.json"), Path("data/eval.json")]
    figures = figures_of(files, tmp_path, recipe=Path("recipes/tiny/qlora.yaml"), picture=tmp_path / "rows.png")
    shown = capsys.readouterr().out
    assert "no row of data/eval.json has a side that stands in data/train.json" in shown
    assert figures["notes"] == []
    tokens = figures["files"]["data/eval.json"]["tokens"]
    # One token a character, and EOS.
    most = figures["files"]["data/eval.json"]["characters"]["output"]["most"]
    assert tokens["output"]["most"] == most + 1 == 80
    assert (tokens["over_max_length"], tokens["unknown_in_prompts"], tokens["unknown_in_outputs"]) == (0, 0, 0)
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_rows_of_every_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('[{"id": "1", "instruction": 3}]', encoding="utf-8")
    assert main(["data", "check", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    said = capsys.readouterr().err
    assert "a.json: row 1 (id 1): instruction is a number, text is needed" in said
    assert "b.json: no such file" in said


# ------------------------------------------------------------------------------------------------------ own data

CSV = '古,今,號\n雨止。,雨停了。,007\n"雪深三尺，人不得行。","雪有三尺深，人走不了。",008\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import pandas

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    table = pandas.read_csv(tmp_path / "a.csv", dtype=str)
    table.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True, force_ascii=False)
    return tmp_path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.jsonl"])
def test_any_format_and_a_template_give_rows(sources: Path, name: str) -> None:
    words = ["--columns", "input=古", "output=今", "id=號", "--template", r"{x}\n翻譯成現代文："]
    assert main(["data", "rows", str(sources / name), "--out", str(sources / "out.json"), *words]) == 0
    assert [(row.id, row.instruction, row.output) for row in read_rows(sources / "out.json")] == [
        ("007", "雨止。\n翻譯成現代文：", "雨停了。"),
        ("008", "雪深三尺，人不得行。\n翻譯成現代文：", "雪有三尺深，人走不了。"),
    ]


def test_classical_and_modern_columns_are_worded_as_the_homeworks(sources: Path) -> None:
    from hw3.corpus.build import sides

    out = sources / "out.json"
    columns = ["--columns", "classical=古", "modern=今"]
    assert main(["data", "rows", str(sources / "a.csv"), "--out", str(out), *columns]) == 0
    first = out.read_bytes()
    assert [set(sides(row)) for row in read_rows(out)] == [
        {"雨止。", "雨停了。"},
        {"雪深三尺，人不得行。", "雪有三尺深，人走不了。"},
    ]
    out.unlink()
    assert main(["data", "rows", str(sources / "a.csv"), "--out", str(out), *columns]) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.csv", "--columns", "input=古", "output=譯"], "--columns output=譯: no such column; a.csv has 古, 今, 號"),
        (
            ["a.csv", "--columns", "input=古", "outpt=今"],
            "input=COLUMN output=COLUMN or classical=COLUMN modern=COLUMN",
        ),
        (["a.csv", "--columns", "input=古", "output=今", "--template", "翻譯"], "holds {x} exactly once"),
        (["a.csv", "--columns", "classical=古", "modern=今", "--template", "{x}"], "goes with input= and output="),
        (["b.csv", "--columns", "input=古", "output=今"], "b.csv: row 2: 今 is empty, text is needed"),
        (["c.csv", "--columns", "input=古", "output=今", "id=號"], "c.csv: id 1 stands 2 times; ids must differ"),
        (["none.csv", "--columns", "input=古", "output=今"], "none.csv: no such file"),
        (["notes.md", "--columns", "input=古", "output=今"], "notes.md: read as a file by its ending: .csv, .tsv"),
        (["torn.parquet", "--columns", "input=古", "output=今"], "torn.parquet: cannot be read as a dataset"),
        (["nobody/nothing", "--columns", "input=古", "output=今"], "nobody/nothing: cannot be read as a dataset"),
    ],
)
def test_own_data_that_does_not_fit_is_named_and_nothing_is_written(
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(sources)
    Path("b.csv").write_text("古,今\n雨止。,雨停了。\n雪深。,\n", encoding="utf-8")
    Path("c.csv").write_text("古,今,號\n雨止。,雨停了。,1\n雪深。,雪很深。,1\n", encoding="utf-8")
    Path("notes.md").write_text("古\n", encoding="utf-8")
    Path("torn.parquet").write_bytes(b"torn")
    assert main(["data", "rows", *words, "--out", "out.json"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out.json").exists()


def test_rows_are_never_written_over(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sources / "out.json"
    out.write_text("mine", encoding="utf-8")
    words = ["--columns", "input=古", "output=今", "--out", str(out)]
    assert main(["data", "rows", str(sources / "a.csv"), *words]) == 2
    assert f"{out}: there already and never written over" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine"
