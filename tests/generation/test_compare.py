"""Answers side by side, from files alone: no model is loaded here."""

import json
from pathlib import Path

import pytest
from helpers import REPOSITORY, hw3
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.atomic_io import write_json
from hw3.common.hashing import file_sha256
from hw3.data.rows import Row, read_rows
from hw3.evaluation.perplexity import RowScore
from hw3.evaluation.results import Results
from hw3.evaluation.translation_metrics import copy_input, quality
from hw3.generation.compare import COLOURS, STUDY_ROW, compare_runs, disagreement_of, harmless, mark
from hw3.runs.checkpoints import complete_checkpoints, mark_complete

DATA = [
    {"id": "rain", "instruction": "今日無雨。\n翻譯成現代文：", "output": "今天沒有下雨。"},
    {"id": "hill", "instruction": "山很高。\n翻譯成文言文：", "output": "山高。"},
    {"id": "free", "instruction": "說說\n你自己", "output": "我是人。"},
]
GOOD = {"rain": "今天沒有雨。", "hill": "山甚高。", "free": "我是人。"}
BAD = {"rain": "山山山", "hill": "山高。", "free": ""}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(DATA, ensure_ascii=False), encoding="utf-8")


def make_run(name: str, data: str = "rows.json") -> Path:
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
    return complete_checkpoints(Path("one"))[0].sha256


def answer(run: Path, name: str, texts: dict[str, str], *, adapter: str | None = None, data: str = "rows.json") -> None:
    """As predict leaves it."""
    folder = run / "predictions" / Path(data).stem
    rows = read_rows(Path(data))
    write_json(folder / f"{name}.json", [{"id": row.id, "output": texts[row.id]} for row in rows])
    record = {
        "data": {"path": data, "sha256": file_sha256(Path(data)), "rows": len(rows)},
        "name": name,
        "checkpoint": name if name.startswith("checkpoint") else None,
        "adapter_sha256": adapter,
        "shots": 0,
        "prompt": {"name": "study", "sha256": "p"},
        "predictions_sha256": file_sha256(folder / f"{name}.json"),
        "groups": quality(rows, texts),
        "copy_input": copy_input(rows),
    }
    write_json(folder / f"{name}.quality.json", record)


def score(run: Path, perplexity: dict[str | None, float]) -> None:
    """As eval leaves it: one perplexity for all rows, by adapter."""
    head = {"schema": 1, "run": run.name, "started": "", "settings": {}}
    head["data"] = {"path": "rows.json", "sha256": file_sha256(Path("rows.json")), "rows": 3}
    results = Results(run / "eval/rows", head, "p")
    for adapter, value in perplexity.items():
        entry = {
            "key": str(adapter),
            "step": 5 if adapter else 0,
            "checkpoint": "checkpoint-5" if adapter else None,
            "shots": 0,
            "prompt": {"name": "study", "sha256": "p"},
            "example_ids": None,
            "adapter_sha256": adapter,
            "mean_perplexity": value,
        }
        results.add(entry, [RowScore(row["id"], 0.0, 1, 1) for row in DATA])


def test_base_and_checkpoint_side_by_side() -> None:
    run = make_run("one")
    answer(run, "checkpoint-5", GOOD, adapter=adapter_sha256())
    answer(run, "base", BAD)
    score(run, {None: 9.5, adapter_sha256(): 4.25})
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
        "  base           ppl 1.00  (nothing)\n"
        "  checkpoint-5   ppl 1.00  我是人。\n"
        "\n"
        "hill  disagreement 0.14\n"
        "  input                    山很高。  (to Classical)\n"
        "  reference                山高。\n"
        "  base           ppl 1.00  山高。\n"
        "  checkpoint-5   ppl 1.00  山【甚】高。\n"
    )


def test_rows_asked_for_and_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("one")
    answer(run, "base", BAD)
    shown, _ = hw3("compare", "one/base", "--id", "hill", "free")
    assert [line.split()[0] for line in shown.splitlines() if "disagreement" in line] == ["hill", "free"]
    # One answer alone: how far it is from the reference. Not scored: a line says so.
    assert "hill  disagreement 0.00" in shown and "ppl 1" not in shown
    assert "not all are scored; row perplexities come from hw3 eval (one)" in shown
    shown, _ = hw3("compare", run, "--rows", "1")
    assert "1 of 3 rows, those that differ most first; --rows 0 shows all" in shown
    assert hw3("compare", run, "--rows", "0")[0].count("disagreement") == 3
    compare_runs(["one"], ids=["rain"], colour=True)
    assert f"{COLOURS[0]}山山山{COLOURS[1]}" in capsys.readouterr().out
    assert "--rows -1: give how many rows to show" in hw3("compare", run, "--rows", "-1", expected=2)[1]
    assert "--id cloud: no such row in rows.json" in hw3("compare", run, "--id", "cloud", expected=2)[1]


def test_two_models_begin_with_the_study_s_row(tmp_path: Path) -> None:
    rows = [*DATA, {**DATA[1], "id": STUDY_ROW}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    for name, texts in (("one", GOOD), ("two", BAD)):
        answer(make_run(name), "base", texts | {STUDY_ROW: "山高。"})
    assert "study" not in hw3("compare", "one", "--rows", "1")[0]
    shown, _ = hw3("compare", "one", "two", "one/base", "--rows", "1")
    heads = [line for line in shown.splitlines() if "disagreement" in line]
    assert heads == [f"{STUDY_ROW}  disagreement 0.00, the study's own row", "rain  disagreement 1.00"]
    # Given twice, shown once.
    assert shown.count("one/base") == shown.count("two/base") == 1 + 2


def test_runs_of_one_name_are_told_apart() -> None:
    Path("a").mkdir()
    Path("b").mkdir()
    for name in ("a/run", "b/run"):
        answer(make_run(name), "base", GOOD)
    shown, _ = hw3("compare", "a/run", "b/run/", "--id", "rain")
    assert "a/run/base" in shown and "b/run/base" in shown


def test_what_is_missing_comes_with_its_command() -> None:
    run = make_run("one")

    def said(*words: str) -> str:
        return hw3("compare", *words, expected=2)[1]

    assert said("nothing") == (
        "hw3: nothing: no such run; give a run folder, or one with /base or /checkpoint-100 behind it\n"
    )
    assert said("one") == "hw3: one: no answers to rows.json yet: hw3 predict one rows.json\n"
    answer(run, "checkpoint-5", GOOD, adapter="0" * 64)
    assert said("one/base+4") == (
        "hw3: one: no answers of base+4 to rows.json yet: hw3 predict one rows.json --checkpoint base --shots 4\n"
    )
    assert "checkpoint-5 has been trained anew since: hw3 predict one rows.json --checkpoint checkpoint-5" in said(
        "one"
    )
    answer(run, "checkpoint-5", GOOD, adapter=adapter_sha256())
    write_json(run / "predictions/rows/checkpoint-5.json", [])
    assert "checkpoint-5.json: changed since it was made: hw3 predict one rows.json\n" in said("one")


def test_which_file_where_several_were_answered() -> None:
    run = make_run("one", data="third.json")
    for name, count in (("other.json", 1), ("third.json", 2)):
        Path(name).write_text(json.dumps(DATA[:count], ensure_ascii=False), encoding="utf-8")
    answer(run, "base", GOOD, data="rows.json")
    assert "3 rows of rows.json" in hw3("compare", run)[0]  # the one that was
    answer(run, "base", GOOD, data="other.json")
    assert "answers are there to other.json, rows.json; say which file: --data FILE" in hw3(
        "compare", run, expected=2
    )[1]  # fmt: skip
    assert "1 rows of other.json" in hw3("compare", run, "--data", "other.json")[0]
    answer(run, "base", GOOD, data="third.json")
    assert "2 rows of third.json" in hw3("compare", run)[0]  # the recipe's


@given(st.text(max_size=20), st.text(max_size=20))
def test_marks_add_brackets_alone(text: str, other: str) -> None:
    marked = mark(text, other, ("<<", ">>"))
    assert marked.replace("<<", "").replace(">>", "") == harmless(text).replace("<<", "").replace(">>", "")
    assert mark(text, text, ("<<", ">>")) == harmless(text)
    assert not any(ord(character) < 32 or ord(character) == 127 for character in marked)


def test_what_differs_is_marked() -> None:
    assert mark("山甚高也。", "山高。", ("[", "]")) == "山[甚]高[也]。"
    assert mark("", "山", ("[", "]")) == ""
    assert harmless("甲\n\x1b[2J\u202e　乙") == "甲⏎\\u001b[2J\\u202e　乙"


@given(st.lists(st.text("甲乙丙丁", max_size=8), min_size=1, max_size=4))
def test_disagreement_lies_between_0_and_1(texts: list[str]) -> None:
    row = Row("1", "問", "甲乙")
    assert 0 <= disagreement_of(texts, row) <= 1
    assert disagreement_of([texts[0]] * 3, row) == 0
    assert disagreement_of(["甲乙"], row) == 0 and disagreement_of(["丙"], row) == 1
