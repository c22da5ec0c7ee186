"""Question 3: runs of different base models."""

from pathlib import Path

from sample_runs import write_and_read_report, write_run


def test_models_with_different_tokenizers_are_compared_by_bits_per_character() -> None:
    main, large = write_run(Path("outputs/a")), write_run(Path("outputs/large"), base="some/large", tokenizer="t2")
    page, _ = write_and_read_report(main, large)
    assert page.table("Models side by side")[1:] == [
        ["outputs/a", "data/tiny", "50,000", "1,000", "30.00", "12.00 (2)", "6.00 [4.00, 8.00]", "10", "1.500"],
        ["outputs/large", "some/large", "50,000", "1,000", "30.00", "12.00 (2)", "6.00 [4.00, 8.00]", "10", "1.500"],
    ]
    assert "have different tokenizers" in page.body


def test_models_with_the_same_tokenizer_are_compared_by_perplexity() -> None:
    page, _ = write_and_read_report(write_run(Path("outputs/a")), write_run(Path("outputs/large"), base="some/large"))
    assert "have the same tokenizer, so their perplexities can be compared." in page.body
    assert "The difference is +0.00 [+0.00, +0.00]" in page.body


def test_models_scored_on_different_rows_are_not_compared() -> None:
    main, other = write_run(Path("outputs/a")), write_run(Path("outputs/other"), base="some/large", marker="！")
    page, _ = write_and_read_report(main, other)
    assert "outputs/other and outputs/a were scored on different rows" in page.body
    # Writing the other run changed the scored file, so the page shows no text of it.
    assert "data/eval.json is missing or has changed since it was scored" in page.body
