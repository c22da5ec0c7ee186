"""Metrics of predictions: values computed by hand, and copying the input as a baseline."""

from dataclasses import asdict

import pytest
from helpers import SHARED

from hw3.data.rows import Row, read_rows
from hw3.data.templates import TEMPLATES, Template
from hw3.evaluation.translation_metrics import compute_metrics, metrics_of_copying, print_metrics

ROWS = [
    Row("a", "今天下雨。\n翻譯成文言文：", "今日雨。"),
    Row("b", "今日雨。\n翻譯成現代文：", "今天下雨。"),
    Row("c", "文言文翻譯：\n無雨。", "答案：沒有下雨。"),
    Row("d", "說說你自己", "我是人。"),
]


def test_compute_metrics_groups_rows_by_direction() -> None:
    outputs = {"a": "今日雨。", "b": "今日雨。", "c": "沒有下雨。", "d": "我是人"}
    groups = compute_metrics(ROWS, outputs, frozenset({"d"}))
    assert list(groups) == ["all", "m2c", "c2m"]
    assert asdict(groups["m2c"]) == {
        "rows": 1,
        "bleu": pytest.approx(100),
        "chrf": pytest.approx(100),
        "exact_match": 1.0,
        "copy_rate": 0.0,
        "length_ratio": 1.0,
        "unfinished": 0.0,
    }
    # The prefix 答案：, which one template asks for, is not part of the translation: c is right with and without it.
    assert groups["c2m"].exact_match == 0.5 and groups["c2m"].copy_rate == 0.5
    assert groups["c2m"].length_ratio == 9 / 10
    assert compute_metrics(ROWS, outputs | {"c": "答案：沒有下雨。"}, frozenset({"d"})) == groups
    # A row without a known template counts only in `all`.
    assert groups["all"].rows == 4 and groups["all"].unfinished == 0.25
    assert groups["all"].length_ratio == 16 / 18


def test_bleu_and_chrf_equal_values_computed_by_hand() -> None:
    """Output 甲乙丙丁, reference 甲乙丙戊: 3 of 4, 2 of 3, 1 of 2 and 0 of 1 n-grams match.

    sacrebleu's exponential smoothing counts the first order without a match as half a match. chrF2 averages precision
    (here equal to recall) over the orders that exist, 4 of its 6.
    """
    metrics = compute_metrics([Row("1", "問", "甲乙丙戊")], {"1": "甲乙丙丁"})["all"]
    assert metrics.bleu == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 0.5 / 1) ** 0.25)
    assert metrics.chrf == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)


def test_compute_metrics_handles_empty_outputs_and_missing_references() -> None:
    assert compute_metrics([Row("1", "問", "甲乙")], {"1": ""})["all"].bleu == 0
    assert compute_metrics([Row("1", "問", None)], {"1": "甲"}) == {} == metrics_of_copying([Row("1", "問", "甲")])


@pytest.mark.parametrize("template", TEMPLATES, ids=[template.text for template in TEMPLATES])
def test_metrics_of_copying_use_only_the_sentence_of_the_instruction(template: Template) -> None:
    metrics = metrics_of_copying([Row("1", template.render("山高水長"), template.output_prefix + "山高水長")])
    assert metrics["all"] == metrics[template.direction]
    assert metrics["all"].exact_match == metrics["all"].copy_rate == 1.0
    assert metrics["all"].bleu == pytest.approx(100)


def test_print_metrics_prints_a_line_per_metric(capsys: pytest.CaptureFixture[str]) -> None:
    print_metrics(compute_metrics(ROWS[:1], {"a": "今日無雨。"}), metrics_of_copying(ROWS[:1]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["all", "copying", "to", "Classical", "copying"]
    assert lines[1].split() == ["rows", "1", "1"]
    assert lines[4].startswith(
        "exact               0.0%     0.0%         0.0%     0.0%  predictions equal to the reference"
    )
    assert lines[6].split()[:5] == ["length", "1.25", "1.25", "1.25", "1.25"]
    assert [line.split()[0] for line in lines[2:]] == ["BLEU", "chrF", "exact", "copied", "length", "unfinished"]


def test_metrics_of_copying_the_courses_rows_equal_the_published_values() -> None:
    """The course's note gives these values to one decimal."""
    file = SHARED / "homework/public_test.json"
    if not file.exists():
        pytest.skip("the course's rows are not here")
    copying = metrics_of_copying(read_rows(file))
    values = {name: (group.rows, round(group.bleu, 1), round(group.chrf, 1)) for name, group in copying.items()}
    # Copies into modern Chinese are too short. In `all`, the longer copies of the other direction make up for it.
    assert values == {"all": (250, 24.2, 22.0), "m2c": (137, 21.7, 26.1), "c2m": (113, 18.2, 18.4)}
