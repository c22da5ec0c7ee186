"""Question 2: zero-shot and few-shot scores, and the prompts."""

from pathlib import Path

from markdown_it import MarkdownIt
from sample_runs import STARTED, Page, write_and_read_report, write_run

from hw3.config.recipe import load_prompt, load_recipe
from hw3.evaluation.results import EvalResults
from hw3.runs.results_file import PromptReference


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


def test_several_prompts_are_ranked_and_reproduced_by_one_command() -> None:
    run = write_run(Path("outputs/a"))
    results = EvalResults.read(run / "eval/eval", load_recipe(run / "recipe.yaml").prompt.sha256, STARTED)
    Path("recipes/prompts").mkdir(parents=True)
    # Perplexities 7.5 and 12, as the sample runs have them for other entries.
    for name, label in (("short", "checkpoint-20"), ("long", "base+2")):
        file = Path(f"recipes/prompts/{name}.yaml")
        file.write_text(f'turn: "{name}：{{instruction}}"\n', encoding="utf-8")
        prompt = PromptReference(name=name, sha256=load_prompt(file).sha256)
        source = next(entry for entry in results.entries if entry.key == label)
        update = {"key": name, "step": 0, "checkpoint": None, "shots": 0, "prompt": prompt, "adapter_sha256": None}
        results.add(source.model_copy(update=update | {"prompt_tokens": 50}), results.row_scores[label])
    page, markdown = write_and_read_report(run)
    rows = page.table("Prompts, the best first")
    assert rows[0][4].startswith("difference from recipe ")
    assert [(row[0], row[1], row[3].split()[0], row[6]) for row in rows[1:]] == [
        ("recipe", "checkpoint-10, zero-shot", "6.00", ""),
        ("short", "base model, zero-shot", "7.50", "12"),  # 50 tokens in 4 rows
        ("recipe", "base model, 2-shot", "12.00", ""),
        ("long", "base model, zero-shot", "12.00", "12"),
        ("recipe", "base model, zero-shot", "30.00", ""),
    ]
    assert [row[4].split()[0] for row in rows[2:4]] == ["+1.50", "+6.00"]
    assert len(page.table("Zero-shot, few-shot and fine-tuned")) == 4
    assert (
        "Compared with the best prompt for the base model, fine-tuning changes the mean perplexity by −1.50"
        in page.body
    )
    command = "hw3 eval outputs/a --prompt recipes/prompts/long.yaml recipes/prompts/short.yaml --base-only --shots 0"
    assert command in page.commands and command in markdown
