"""Figures of answers, by hand where they can be; copying the input as the course's rows know it."""

import json

import pytest
from helpers import SHARED

from hw3.data.rows import Row, read_rows
from hw3.data.templates import TEMPLATES
from hw3.evaluation.translation_metrics import copy_input, print_quality, quality

ROWS = [
    Row("a", "今天下雨。\n翻譯成文言文：", "今日雨。"),
    Row("b", "今日雨。\n翻譯成現代文：", "今天下雨。"),
    Row("c", "文言文翻譯：\n無雨。", "答案：沒有下雨。"),
    Row("d", "說說你自己", "我是人。"),
]


def test_figures_by_direction() -> None:
    answers = {"a": "今日雨。", "b": "今日雨。", "c": "沒有下雨。", "d": "我是人"}
    groups = quality(ROWS, answers, frozenset({"d"}))
    assert list(groups) == ["all", "m2c", "c2m"]
    assert groups["m2c"] == {
        "rows": 1,
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
        "exact_match": 1.0,
        "copy_rate": 0.0,
        "length_ratio": 1.0,
        "unfinished": 0.0,
    }
    # 答案：is what one template asks for, no part of the translation: c is right without it, and with it.
    assert groups["c2m"]["exact_match"] == 0.5 and groups["c2m"]["copy_rate"] == 0.5
    assert groups["c2m"]["length_ratio"] == 9 / 10
    assert quality(ROWS, answers | {"c": "答案：沒有下雨。"}, frozenset({"d"})) == groups
    # A row that follows no template counts among all.
    assert groups["all"]["rows"] == 4 and groups["all"]["unfinished"] == 0.25
    assert groups["all"]["length_ratio"] == 16 / 18


def test_bleu_and_chrf_by_hand() -> None:
    """Answer 甲乙丙丁, reference 甲乙丙戊: n-grams that match are 3 of 4, 2 of 3, 1 of 2, 0 of 1.

    sacrebleu's exponential smoothing counts the first order without a match as half a match. chrF2 averages precision
    (here equal to recall) over the orders that exist, 4 of its 6.
    """
    figures = quality([Row("1", "問", "甲乙丙戊")], {"1": "甲乙丙丁"})["all"]
    assert figures["bleu"] == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 0.5 / 1) ** 0.25)
    assert figures["chrf"] == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)


def test_nothing_answered_and_nothing_to_compare() -> None:
    assert quality([Row("1", "問", "甲乙")], {"1": ""})["all"]["bleu"] == 0
    assert quality([Row("1", "問", None)], {"1": "甲"}) == {} == copy_input([Row("1", "問", "甲")])


@pytest.mark.parametrize("template", TEMPLATES, ids=[template.text for template in TEMPLATES])
def test_copying_gives_back_the_sentence_alone(template: object) -> None:
    figures = copy_input([Row("1", template.render("山高水長"), template.answer_prefix + "山高水長")])
    assert figures["all"] == figures[template.direction]
    assert figures["all"]["exact_match"] == figures["all"]["copy_rate"] == 1.0
    assert figures["all"]["bleu"] == pytest.approx(100)


def test_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_quality(quality(ROWS[:1], {"a": "今日無雨。"}), copy_input(ROWS[:1]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["all", "copying", "to", "Classical", "copying"]
    assert lines[1].split() == ["rows", "1", "1"]
    assert lines[4].startswith(
        "exact               0.0%     0.0%         0.0%     0.0%  answers equal to the reference"
    )
    assert lines[6].split()[:5] == ["length", "1.25", "1.25", "1.25", "1.25"]
    assert [line.split()[0] for line in lines[2:]] == ["BLEU", "chrF", "exact", "copied", "length", "unfinished"]


def test_copying_the_course_s_rows() -> None:
    """The course's note knows these to one decimal."""
    file = SHARED / "homework/public_test.json"
    if not file.exists():
        pytest.skip("the course's rows are not here")
    figures = copy_input(read_rows(file))
    found = {way: (group["rows"], round(group["bleu"], 1), round(group["chrf"], 1)) for way, group in figures.items()}
    # Copies into modern Chinese are too short; among all, the longer ones of the other direction make up for it.
    assert found == {"all": (250, 24.2, 22.0), "m2c": (137, 21.7, 26.1), "c2m": (113, 18.2, 18.4)}


def test_figures_are_json() -> None:
    assert json.loads(json.dumps(copy_input(ROWS))) == copy_input(ROWS)
