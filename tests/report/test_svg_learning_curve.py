"""The learning curve as a picture of the page. The page has it twice: for wide and for narrow screens."""

from sample_runs import Page


def test_every_point_has_a_tooltip(page: Page) -> None:
    for tooltip in (
        "step 0: 30.000 [28.00, 32.00]",
        "step 20: 7.500 [5.50, 9.50]",
        "best: step 10: 6.000 [4.00, 8.00]",
    ):
        assert page.texts["title"].count(tooltip) == 2, tooltip


def test_lines_and_axes_are_labelled(page: Page) -> None:
    for label in ("base 30.00", "2-shot 12.00", "best 6.00, step 10", "training loss, nats per token"):
        assert page.texts["text"].count(label) == 2, label
