"""`hw3 data rows` on files in every format, and on input that it refuses."""

from pathlib import Path

import pytest

from hw3.cli import main
from hw3.corpus.row_sides import row_sides
from hw3.data.rows import read_rows

CSV = '古,今,號\n雨止。,雨停了。,007\n"雪深三尺，人不得行。","雪有三尺深，人走不了。",008\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the same table as CSV, TSV, Parquet and JSON Lines."""
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
def test_import_rows_reads_every_format_with_a_template(sources: Path, name: str) -> None:
    arguments = ["--columns", "input=古", "output=今", "id=號", "--template", r"{x}\n翻譯成現代文："]
    assert main(["data", "rows", str(sources / name), "--output", str(sources / "out.json"), *arguments]) == 0
    assert [(row.id, row.instruction, row.output) for row in read_rows(sources / "out.json")] == [
        ("007", "雨止。\n翻譯成現代文：", "雨停了。"),
        ("008", "雪深三尺，人不得行。\n翻譯成現代文：", "雪有三尺深，人走不了。"),
    ]


def test_import_rows_gives_classical_and_modern_columns_the_homeworks_templates(sources: Path) -> None:
    output = sources / "out.json"
    command = ["data", "rows", str(sources / "a.csv"), "--output", str(output)]
    command += ["--columns", "classical=古", "modern=今"]
    assert main(command) == 0
    first = output.read_bytes()
    assert [set(row_sides(row)) for row in read_rows(output)] == [
        {"雨止。", "雨停了。"},
        {"雪深三尺，人不得行。", "雪有三尺深，人走不了。"},
    ]
    output.unlink()
    assert main(command) == 0
    assert output.read_bytes() == first


def test_import_rows_reports_outputs_that_begin_with_the_homeworks_prefix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(f"山高{number}。,山很高{number}。\n" for number in range(38))
    (tmp_path / "a.csv").write_text(f"古,今\n{lines}", encoding="utf-8")
    output = tmp_path / "out.json"
    columns = ["--columns", "classical=古", "modern=今"]
    assert main(["data", "rows", str(tmp_path / "a.csv"), "--output", str(output), *columns]) == 0
    assert sum(row.output.startswith("答案：") for row in read_rows(output)) == 2
    assert "2 outputs begin with 答案：, as in the homework's rows with the template 文言文翻譯：\\n{x}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.csv", "--columns", "input=古", "output=譯"], "--columns output=譯: no such column; a.csv has 古, 今, 號"),
        (
            ["a.csv", "--columns", "input=古", "outpt=今"],
            "input=COLUMN output=COLUMN or classical=COLUMN modern=COLUMN",
        ),
        (["a.csv", "--columns", "input=古", "output=今", "--template", "翻譯"], "must contain {x} exactly once"),
        (
            ["a.csv", "--columns", "classical=古", "modern=今", "--template", "{x}"],
            "needs the columns input= and output=",
        ),
        (["b.csv", "--columns", "input=古", "output=今"], "b.csv: line 3: 今 is empty, expected text"),
        (["c.csv", "--columns", "input=古", "output=今", "id=號"], "c.csv: id 1 occurs 2 times; ids must differ"),
        (["none.csv", "--columns", "input=古", "output=今"], "none.csv: no such file"),
        (
            ["notes.md", "--columns", "input=古", "output=今"],
            "notes.md: found the file suffix '.md', expected one of .csv, .tsv",
        ),
        (["cut.parquet", "--columns", "input=古", "output=今"], "cut.parquet: cannot be read as a dataset"),
        (["nobody/nothing", "--columns", "input=古", "output=今"], "nobody/nothing: cannot be read as a dataset"),
    ],
)
def test_import_rows_refuses_wrong_input_and_writes_nothing(
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(sources)
    Path("b.csv").write_text("古,今\n雨止。,雨停了。\n雪深。,\n", encoding="utf-8")
    Path("c.csv").write_text("古,今,號\n雨止。,雨停了。,1\n雪深。,雪很深。,1\n", encoding="utf-8")
    Path("notes.md").write_text("古\n", encoding="utf-8")
    Path("cut.parquet").write_bytes(b"cut")
    assert main(["data", "rows", *arguments, "--output", "out.json"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out.json").exists()


def test_import_rows_never_overwrites_a_file(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = sources / "out.json"
    output.write_text("mine", encoding="utf-8")
    arguments = ["--columns", "input=古", "output=今", "--output", str(output)]
    assert main(["data", "rows", str(sources / "a.csv"), *arguments]) == 2
    assert f"{output}: exists already and is never overwritten" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "mine"
