"""`hw3 compare` works from files; no model is loaded here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY, SCORING_SETTINGS, hw3, make_score_entry
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.atomic_io import write_json
from hw3.common.hashing import file_sha256
from hw3.data.fingerprint import dataset_fingerprint
from hw3.data.rows import Row, read_rows
from hw3.evaluation.perplexity import RowScore
from hw3.evaluation.results import EvalResults
from hw3.evaluation.translation_metrics import compute_metrics, metrics_of_copying
from hw3.generation.compare import (
    COLOR_MARKS,
    STUDY_ROW_ID,
    compare_runs,
    compute_disagreement,
    escape_control_characters,
    mark_differences,
)
from hw3.runs.checkpoints import find_complete_checkpoints, mark_complete
from hw3.runs.prediction_record import PredictionRecord
from hw3.runs.results_file import PromptReference

ROWS = [
    {"id": "rain", "instruction": "今日無雨。\n翻譯成現代文：", "output": "今天沒有下雨。"},
    {"id": "hill", "instruction": "山很高。\n翻譯成文言文：", "output": "山高。"},
    {"id": "free", "instruction": "說說\n你自己", "output": "我是人。"},
]
GOOD = {"rain": "今天沒有雨。", "hill": "山甚高。", "free": "我是人。"}
BAD = {"rain": "山山山", "hill": "山高。", "free": ""}
PROMPT = PromptReference(name="study", sha256="p")


@pytest.fixture(autouse=True)
def in_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder that holds `rows.json`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")


def make_run(name: str, data: str = "rows.json") -> Path:
    """Make a run folder with `checkpoint-5`, which holds no weights."""
    run = Path(name)
    run.mkdir()
    recipe = (REPOSITORY / "recipes/tiny/qlora.yaml").read_text(encoding="utf-8")
    recipe = recipe.replace("recipes/prompts/study.yaml", "{system: 你是翻譯。}").replace("data/eval.json", data)
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    checkpoint = run / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text(name, encoding="utf-8")
    mark_complete(checkpoint, 5)
    return run


def adapter_sha256() -> str:
    return find_complete_checkpoints(Path("one"))[0].sha256


def write_predictions(
    run: Path, name: str, outputs: dict[str, str], *, adapter: str | None = None, data: str = "rows.json"
) -> None:
    """Write predictions and their record, as `hw3 predict` does."""
    rows = read_rows(Path(data))
    path = run / "predictions" / Path(data).stem / f"{name}.json"
    write_json(path, [{"id": row.id, "output": outputs[row.id]} for row in rows])
    PredictionRecord(
        key="key",
        run=run.name,
        data=dataset_fingerprint(Path(data), rows),
        name=name,
        checkpoint=name if name.startswith("checkpoint") else None,
        adapter_sha256=adapter,
        shots=0,
        prompt=PROMPT,
        generation={},
        seconds=1.0,
        rows_per_second=1.0,
        unfinished_ids=[],
        predictions_sha256=file_sha256(path),
        groups=compute_metrics(rows, outputs),
        copy_input=metrics_of_copying(rows),
    ).write(path.with_suffix(".quality.json"))


def write_scores(run: Path, mean_perplexities: dict[str | None, float]) -> None:
    """Write results, as `hw3 eval` does: a perplexity of 1 for every row, and a mean by adapter."""
    results = EvalResults(
        run / "eval/rows",
        run_name=run.name,
        started=None,
        data=dataset_fingerprint(Path("rows.json"), read_rows(Path("rows.json"))),
        settings=SCORING_SETTINGS,
        prompt_sha256=PROMPT.sha256,
    )
    for adapter, value in mean_perplexities.items():
        entry = make_score_entry(5 if adapter else 0, value, prompt=PROMPT.sha256, adapter_sha256=adapter)
        results.add(entry, [RowScore(row["id"], 0.0, 1, 1) for row in ROWS])


def test_compare_prints_base_and_checkpoint_side_by_side() -> None:
    run = make_run("one")
    write_predictions(run, "checkpoint-5", GOOD, adapter=adapter_sha256())
    write_predictions(run, "base", BAD)
    write_scores(run, {None: 9.5, adapter_sha256(): 4.25})
    shown, _ = hw3("compare", run)
    assert shown == (
        "3 rows of rows.json\n"
        "                    mean ppl        BLEU        chrF       exact      copied      length  unfinished\n"
        "base                   9.500         0.0        20.0       33.3%        0.0%        0.43        0.0%\n"
        "checkpoint-5           4.250        60.6        42.9       33.3%        0.0%        1.00        0.0%\n"
        "copying the input          -        17.9        17.4        0.0%      100.0%        0.90        0.0%\n"
        "\n"
        "rain  disagreement 1.00\n"
        "  input                    今日無雨。  (to modern)\n"
        "  reference                今天沒有下雨。\n"
        "  base           ppl 1.00  【山山山】\n"
        "  checkpoint-5   ppl 1.00  今天沒有雨。\n"
        "\n"
        "free  disagreement 1.00\n"
        "  input                    說說⏎你自己\n"
        "  reference                我是人。\n"
        "  base           ppl 1.00  (empty)\n"
        "  checkpoint-5   ppl 1.00  我是人。\n"
        "\n"
        "hill  disagreement 0.14\n"
        "  input                    山很高。  (to Classical)\n"
        "  reference                山高。\n"
        "  base           ppl 1.00  山高。\n"
        "  checkpoint-5   ppl 1.00  山【甚】高。\n"
    )


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_compare_escapes_characters_that_an_ascii_terminal_lacks(environment: dict[str, str]) -> None:
    write_predictions(make_run("one"), "base", BAD)
    done = subprocess.run(
        [sys.executable, "-m", "hw3", "compare", "one"], capture_output=True, env=ENVIRONMENT | environment
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "今日無雨。".encode("ascii", "backslashreplace") in done.stdout


def test_compare_ends_quietly_if_its_reader_has_closed_the_pipe() -> None:
    write_predictions(make_run("one"), "base", BAD)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "hw3", "compare", "one"], stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (143, b"")


def test_compare_selects_rows_by_id_or_number(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("one")
    write_predictions(run, "base", BAD)
    shown, _ = hw3("compare", "one/base", "--id", "hill", "free")
    assert [line.split()[0] for line in shown.splitlines() if "disagreement" in line] == ["hill", "free"]
    # A single system is compared with the reference.
    assert "hill  disagreement 0.00" in shown and "ppl 1" not in shown
    assert "not all systems are scored; hw3 eval computes the perplexities (one)" in shown
    shown, _ = hw3("compare", run, "--rows", "1")
    assert "1 of 3 rows, those that differ most first; --rows 0 shows all" in shown
    assert hw3("compare", run, "--rows", "0")[0].count("disagreement") == 3
    compare_runs(["one"], ids=["rain"], use_color=True)
    assert f"{COLOR_MARKS[0]}山山山{COLOR_MARKS[1]}" in capsys.readouterr().out
    assert "--rows -1: give the number of rows to show" in hw3("compare", run, "--rows", "-1", expected=2)[1]
    assert "--id cloud: no such row in rows.json" in hw3("compare", run, "--id", "cloud", expected=2)[1]


def test_compare_prints_the_study_row_of_several_runs_first(tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[1], "id": STUDY_ROW_ID}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    for name, outputs in (("one", GOOD), ("two", BAD)):
        write_predictions(make_run(name), "base", outputs | {STUDY_ROW_ID: "山高。"})
    assert "study" not in hw3("compare", "one", "--rows", "1")[0]
    shown, _ = hw3("compare", "one", "two", "one/base", "--rows", "1")
    headings = [line for line in shown.splitlines() if "disagreement" in line]
    assert headings == [f"{STUDY_ROW_ID}  disagreement 0.00, the study's own row", "rain  disagreement 1.00"]
    # The base model of `one` is selected twice and shown once: in the table and in two rows.
    assert shown.count("one/base") == shown.count("two/base") == 1 + 2


def test_compare_labels_runs_of_the_same_name_by_path() -> None:
    Path("a").mkdir()
    Path("b").mkdir()
    for name in ("a/run", "b/run"):
        write_predictions(make_run(name), "base", GOOD)
    shown, _ = hw3("compare", "a/run", "b/run/", "--id", "rain")
    assert "a/run/base" in shown and "b/run/base" in shown


def test_compare_reports_the_command_for_missing_predictions() -> None:
    run = make_run("one")

    def error(*arguments: str) -> str:
        return hw3("compare", *arguments, expected=2)[1]

    assert error("nothing") == (
        "hw3: nothing: no such run; give a run folder, or one followed by /base or /checkpoint-100\n"
    )
    assert error("one") == "hw3: one: no predictions for rows.json yet: hw3 predict one rows.json\n"
    write_predictions(run, "checkpoint-5", GOOD, adapter="0" * 64)
    assert error("one/base+4") == (
        "hw3: one: no predictions of base+4 for rows.json yet: hw3 predict one rows.json --checkpoint base --shots 4\n"
    )
    assert "checkpoint-5 was trained again since: hw3 predict one rows.json --checkpoint checkpoint-5" in error("one")
    write_predictions(run, "checkpoint-5", GOOD, adapter=adapter_sha256())
    write_json(run / "predictions/rows/checkpoint-5.json", [])
    assert "checkpoint-5.json: edited since it was written: hw3 predict one rows.json\n" in error("one")


def test_compare_selects_the_data_file() -> None:
    run = make_run("one", data="third.json")
    for name, count in (("other.json", 1), ("third.json", 2)):
        Path(name).write_text(json.dumps(ROWS[:count], ensure_ascii=False), encoding="utf-8")
    write_predictions(run, "base", GOOD, data="rows.json")
    assert "3 rows of rows.json" in hw3("compare", run)[0]  # the only file with predictions
    write_predictions(run, "base", GOOD, data="other.json")
    assert "there are predictions for other.json, rows.json; choose the file: --data FILE" in hw3(
        "compare", run, expected=2
    )[1]  # fmt: skip
    assert "1 rows of other.json" in hw3("compare", run, "--data", "other.json")[0]
    write_predictions(run, "base", GOOD, data="third.json")
    assert "2 rows of third.json" in hw3("compare", run)[0]  # the recipe's data.eval


@given(st.text(max_size=20), st.text(max_size=20))
def test_mark_differences_only_adds_marks(text: str, other: str) -> None:
    marked, escaped = mark_differences(text, other, ("<<", ">>")), escape_control_characters(text)
    assert marked.replace("<<", "").replace(">>", "") == escaped.replace("<<", "").replace(">>", "")
    assert mark_differences(text, text, ("<<", ">>")) == escaped
    assert not any(ord(character) < 32 or ord(character) == 127 for character in marked)


def test_mark_differences_marks_what_the_reference_lacks() -> None:
    assert mark_differences("山甚高也。", "山高。", ("[", "]")) == "山[甚]高[也]。"
    assert mark_differences("", "山", ("[", "]")) == ""


def test_escape_control_characters_shows_line_ends_and_codes() -> None:
    assert escape_control_characters("甲\n\x1b[2J\u202e　乙") == "甲⏎\\u001b[2J\\u202e　乙"


@given(st.lists(st.text("甲乙丙丁", max_size=8), min_size=1, max_size=4))
def test_disagreement_is_between_0_and_1(outputs: list[str]) -> None:
    row = Row("1", "問", "甲乙")
    assert 0 <= compute_disagreement(outputs, row) <= 1
    assert compute_disagreement([outputs[0]] * 3, row) == 0
    assert compute_disagreement(["甲乙"], row) == 0 and compute_disagreement(["丙"], row) == 1


def test_compare_says_which_predictions_are_missing() -> None:
    run = make_run("one")
    write_predictions(run, "base", BAD)
    command = "hw3 predict one rows.json --checkpoint"
    assert f"no predictions of checkpoint-5 yet: {command} checkpoint-5\n" in hw3("compare", "one")[0]
    assert "yet:" not in hw3("compare", "one/base")[0]
    write_predictions(run, "base", GOOD, data="rows.json")
    write_predictions(run, "checkpoint-5", GOOD, adapter=adapter_sha256())
    assert "yet:" not in hw3("compare", "one")[0]
    (run / "predictions/rows/base.json").unlink()
    (run / "predictions/rows/base.quality.json").unlink()
    assert f"no predictions of base yet: {command} base\n" in hw3("compare", "one")[0]
