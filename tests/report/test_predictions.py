"""The predictions: metrics, rows, what is missing, and how differences are marked."""

import math
import re
from pathlib import Path

from sample_runs import Page, write_and_read_report, write_predictions, write_run

from hw3.report.predictions import spaced_indices


def test_metrics_are_shown_beside_those_of_copying() -> None:
    run = write_run(Path("outputs/a"))
    write_predictions(run, "checkpoint-10", ["甲"] * 4)
    page, _ = write_and_read_report(run)
    assert page.table("Metrics of the predictions")[1:] == [
        ["copying the input", "all rows", "4", "18.2", "27.4", "25.0%", "", "1.10", ""],
        ["checkpoint-10", "all rows", "4", "27.8", "27.4", "25.0%", "50.0%", "1.10", "0.0%"],
        ["checkpoint-10", "into Classical", "2", "30.0", "27.4", "25.0%", "50.0%", "1.10", "0.0%"],
    ]


def test_rows_show_perplexities_predictions_and_differences() -> None:
    run = write_run(Path("outputs/a"))
    write_predictions(run, "checkpoint-10", ["今天不下雨。", "今日無雨。", "山高月小。", "山高月小。"])
    page, markdown = write_and_read_report(run)
    articles = page.texts["article"]
    assert len(articles) == 4
    assert page.texts["h4"] == ["row-1", "row-2", "row-3", "row-4"]
    assert re.sub(r"\s+", "", articles[0]) == (
        "row-1instruction今日無雨。翻譯成現代文：reference今天沒有下雨。base8.00base+28.00checkpoint-104.00今天不下雨。"
    )
    # 沒有 of the first reference became 不; the third prediction shares 山, 高, 月, 小 and 。 in their order.
    assert page.texts["mark"] == ["highlighted", "不"]
    assert [dict(a)["data-direction"] for tag, a in page.tags if tag == "article"] == ["c2m", "m2c", "c2m", "m2c"]
    assert "- checkpoint-10 (4.00): 今天不下雨。" in markdown
    assert "hw3 predict outputs/a data/eval.json --checkpoint checkpoint-10" in page.body


def test_an_empty_prediction_is_named() -> None:
    run = write_run(Path("outputs/a"))
    write_predictions(run, "checkpoint-10", ["", "今日無雨。", "山高。", "山高。"])
    page, markdown = write_and_read_report(run)
    assert [article.count("(empty)") for article in page.texts["article"]] == [1, 0, 0, 0]
    assert "- checkpoint-10 (4.00): *(empty)*\n" in markdown


def test_rows_can_be_sorted_by_length_perplexity_and_gain(page: Page) -> None:
    assert page.texts["option"][3:] == [
        "file order",
        "largest ratio of perplexities first",
        "longest reference first",
        "highest perplexity first: base",
        "highest perplexity first: base+2",
        "highest perplexity first: checkpoint-10",
        "largest gain from fine-tuning first",
    ]
    keys = [dict(attributes)["data-keys"] for tag, attributes in page.tags if tag == "article"]
    assert (keys[3] or "").split() == ["3", f"{-math.log(8):.5g}", "-5", "-64", "-16", "-8", f"{math.log(1 / 8):.5g}"]


def test_missing_predictions_are_named_with_their_commands() -> None:
    run = write_run(Path("outputs/a"))
    command = "hw3 predict outputs/a data/eval.json --checkpoint"
    best, base, few_shot = f"{command} checkpoint-10", f"{command} base", f"{command} base --shots 2"

    def read_missing() -> tuple[list[str], str]:
        """Return the printed commands, and the sentence before them."""
        page, _ = write_and_read_report(run)
        sentence = re.search(r"outputs/a has no predictions[^.]*", page.body)
        blocks = [code.splitlines() for code in page.texts["code"]]
        lines = [line for block in blocks if all(line.startswith(command) for line in block) for line in block]
        return lines, "" if sentence is None else sentence[0]

    assert read_missing() == (
        [best, base, few_shot],
        "outputs/a has no predictions yet, only perplexities of the references",
    )
    write_predictions(run, "checkpoint-10", ["甲"] * 4)
    assert read_missing() == ([base, few_shot], "outputs/a has no predictions from base and base+2 yet")
    write_predictions(run, "base", ["甲"] * 4)
    assert read_missing() == ([few_shot], "outputs/a has no predictions from base+2 yet")
    write_predictions(run, "base+2", ["甲"] * 4)
    assert read_missing() == ([], "")


def test_missing_predictions_are_named_for_each_run() -> None:
    run, other = write_run(Path("outputs/a")), write_run(Path("outputs/b"))
    for name in ("checkpoint-10", "base", "base+2"):
        write_predictions(run, name, ["甲"] * 4)
    page, _ = write_and_read_report(run, other)
    assert "outputs/b has no predictions yet" in page.body
    assert "outputs/a has no predictions" not in page.body


def test_systems_of_several_runs_are_named_with_their_run() -> None:
    main, large = write_run(Path("outputs/a")), write_run(Path("outputs/large"), base="some/large")
    page, _ = write_and_read_report(main, large)
    first = page.texts["article"][0]
    assert first.count("outputs/a: ") == 3 and first.count("outputs/large: ") == 3


def test_spaced_indices_cover_both_directions() -> None:
    assert spaced_indices(3, 10) == [0, 1, 2]
    assert spaced_indices(144, 10) == [0, 16, 32, 48, 64, 79, 95, 111, 127, 143]
