"""The order of the sections, and the summary above them."""

from sample_runs import Page


def test_sections_follow_the_homework(page: Page) -> None:
    assert page.texts["h2"] == [
        "1. Data, fine-tuning and final score",
        "2. Zero-shot and few-shot prompting, compared with fine-tuning",
        "3. A second, larger model",
        "Predictions",
        "Reproducibility",
    ]


def test_summary_gives_the_main_scores(markdown: str) -> None:
    assert (
        "- **6.00** fine-tuned, step 10 (95% CI [4.00, 8.00])\n"
        "- **12.00** base model, 2-shot (95% CI [10.00, 14.00])\n"
        "- **30.00** base model, zero-shot (95% CI [28.00, 32.00])\n"
        "- **1.500** bits per character, fine-tuned (comparable across tokenizers)\n"
    ) in markdown
