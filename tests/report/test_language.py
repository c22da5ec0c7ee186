"""A report in another language: every text is translated, with the same numbers."""

import ast
import re
from pathlib import Path
from string import Formatter

from helpers import REPOSITORY
from sample_runs import Page, write_and_read_report, write_predictions, write_run

from hw3.evaluation.translation_metrics import METRIC_DESCRIPTIONS
from hw3.report.formatting import GROUP_NAMES, SHORT_GROUP_NAMES
from hw3.report.language import read_translation, report_language, tr

REPORT = REPOSITORY / "hw3/report"
# Texts that reach `tr` as values of variables.
DYNAMIC_TEXTS = {
    *GROUP_NAMES.values(),
    *SHORT_GROUP_NAMES.values(),
    *(text for texts in METRIC_DESCRIPTIONS.values() for text in texts),
    *("error", "drop", "truncate prompt"),
    *(f"{{count:,}} {noun}" for noun in ("row", "rows", "step", "steps", "optimizer step", "optimizer steps")),
    *(f"{{count:,}} {noun}" for noun in ("session", "sessions", "file", "files", "entry", "entries")),
    *(f"{{count:,}} {noun}" for noun in ("process", "processes", "accumulation step", "accumulation steps")),
    *(f"{{count:,}} {noun}" for noun in ("checkpoint", "checkpoints")),
}


def literal_texts() -> set[str]:
    """Return the texts that the learning curve and the modules and templates of the report pass to `tr`."""
    calls = [
        node
        for path in (*REPORT.glob("*.py"), REPOSITORY / "hw3/evaluation/learning_curve.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tr"
    ]
    texts = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    for name in ("page.html", "page.md"):
        texts |= set(re.findall(r'tr\("(.*?)"[,)]', (REPORT / name).read_text(encoding="utf-8")))
    return texts


def fields(text: str) -> set[tuple[str, str | None]]:
    return {(name, spec) for _, name, spec, _ in Formatter().parse(text) if name is not None}


def test_every_text_has_a_translation_with_the_same_fields() -> None:
    translation = read_translation("zh-TW")
    assert set(translation) == literal_texts() | DYNAMIC_TEXTS
    for text, translated in translation.items():
        assert fields(translated) == fields(text), text


def test_translation_has_full_width_punctuation_between_chinese_characters() -> None:
    for translated in read_translation("zh-TW").values():
        assert not re.search(r"[\u4e00-\u9fff][,;:!?]|[,;!?][\u4e00-\u9fff]|[\u4e00-\u9fff]\.(\s|$)", translated), (
            translated
        )


def test_language_holds_inside_its_block_only() -> None:
    with report_language("zh-TW"):
        assert tr("{steps} steps", steps=3) == "3 步"
    assert tr("{steps} steps", steps=3) == "3 steps"


def test_report_in_chinese_has_the_same_numbers() -> None:
    run = write_run(Path("outputs/a"))
    english, _ = write_and_read_report(run)
    chinese, markdown = write_and_read_report(
        run, options=["--lang", "zh-TW", "--title", "作業三", "--author", "王小明"]
    )
    assert ("html", {"lang": "zh-Hant-TW"}) in chinese.tags and ("html", {"lang": "en"}) in english.tags
    assert chinese.texts["h1"] == ["作業三"] and markdown.startswith("# 作業三\n\n王小明\n")
    assert "hw3 report outputs/a --title '作業三' --author '王小明' --lang zh-TW" in markdown
    headings = [*chinese.texts["h2"], *chinese.texts["h3"], *chinese.texts["caption"], *chinese.texts["dt"]]
    english_only = {text for text in headings if not re.search("[\u4e00-\u9fff]|SHA-256：", text)}
    assert english_only <= {"LoRA alpha", "LoRA dropout", "LoRA r", "LoRA target modules"}

    def numbers(page: Page) -> list[list[str]]:
        cells = [cell for rows in page.tables.values() for row in rows for cell in row]
        return [re.findall(r"\d[\d,.]*", cell) for cell in cells]

    assert numbers(chinese) == numbers(english)
    assert [re.sub(r"\D", "", text) for text in chinese.texts["b"]] == [
        re.sub(r"\D", "", text) for text in english.texts["b"]
    ]


def test_report_in_chinese_has_full_width_punctuation_after_chinese_characters() -> None:
    run = write_run(Path("outputs/a"))
    write_predictions(run, "checkpoint-10", ["今天不下雨。", "今日無雨。", "山高月小。", "山高月小。"])
    _, markdown = write_and_read_report(run, options=["--lang", "zh-TW"])
    text = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    assert "微調後，第 10 步（95% 信賴區間 [4.00, 8.00]）" in text and "  - 題目：" in text and "| 10（最佳） |" in text
    assert not re.findall(r".*[\u4e00-\u9fff] ?[,;:!?(].*", text)


def test_learning_curve_in_a_chinese_report_is_chinese() -> None:
    page, _ = write_and_read_report(write_run(Path("outputs/a")), options=["--lang", "zh-TW"])
    labels = [text for text in page.texts["text"] if not re.fullmatch(r"[\d.]+", text)]
    # Twice: for wide and for narrow screens.
    assert labels[: len(labels) // 2] == labels[len(labels) // 2 :] == [
        "基礎模型 30.00", "2-shot 12.00", "最佳 6.00，第 10 步", "平均困惑度（對數刻度）", "訓練步數",
        "訓練 loss（每 token 的 nat 數）", "outputs/a", "data/eval.json，95% 信賴區間",
    ]  # fmt: skip
    assert {"基礎模型：30.000 [28.00, 32.00]", "最佳：第 10 步：6.000 [4.00, 8.00]"} <= set(page.texts["title"])


def test_title_and_author_are_escaped() -> None:
    options = ["--title", "<b>T</b> `x` \u202e", "--author", "A & <i>", "--student-id", "B1|2"]
    page, markdown = write_and_read_report(write_run(Path("outputs/a")), options=options)
    assert page.texts["h1"] == ["<b>T</b> `x` \\u202e"] and page.texts["title"][0] == page.texts["h1"][0]
    assert "A & <i> · student number B1|2" in page.body
    assert markdown.startswith("# \\<b\\>T\\</b\\>") and "student number B1\\|2" in markdown
