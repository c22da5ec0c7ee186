"""Question 2: zero-shot and few-shot scores, and the prompts."""

from markdown_it import MarkdownIt
from sample_runs import Page


def test_scores_are_compared_with_the_fine_tuned_model(page: Page) -> None:
    rows = page.table("Zero-shot, few-shot and fine-tuned")[1:]
    assert [row[0] for row in rows] == ["base model, zero-shot", "base model, 2-shot", "checkpoint-10, zero-shot"]
    assert [row[2:5] for row in rows] == [
        ["30.00 [28.00, 32.00]", "30.25", "29.75"],
        ["12.00 [10.00, 14.00]", "12.25", "11.75"],
        ["6.00 [4.00, 8.00]", "6.25", "5.75"],
    ]
    assert [row[5].partition(" ")[0] for row in rows] == ["+24.00", "+6.00", ""]
    assert [row[6] for row in rows] == ["0 / 4", "0 / 4", ""]


def test_markdown_has_the_same_scores(markdown: str) -> None:
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    cells = [token.content for token in tokens if token.type == "inline"]
    index = cells.index("checkpoint-10, zero-shot")
    assert cells[index + 1 : index + 4] == ["6.00 [4.00, 8.00]", "6.25", "5.75"]


def test_effects_of_examples_and_of_fine_tuning_are_described(page: Page) -> None:
    assert "The few-shot prompts contain the first 2 of the 2 examples in the recipe's prompt." in page.body
    assert "None of the examples is among the scored rows." in page.body
    assert "They lower the base model's mean perplexity by 18.00" in page.body
    assert "fine-tuning changes the mean perplexity by −6.00 [" in page.body


def test_prompts_are_shown_as_the_model_sees_them(page: Page, markdown: str) -> None:
    prompts = [code for code in page.texts["code"] if code.startswith("你是翻譯。")]
    assert prompts[0] == "你是翻譯。\n問：{instruction}\n\n\n答："
    assert "你是翻譯。\n問：{instruction}\n\n\n答：\n```\n" in markdown
    assert prompts[2].startswith("你是翻譯。\n問：天雨。\n翻譯成現代文：\n\n\n答：下雨了。\n\n問：下雨了。")
