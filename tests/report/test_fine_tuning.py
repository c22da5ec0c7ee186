"""Question 1, first half: data, method and hyperparameters."""

from pathlib import Path

from sample_runs import Page, write_and_read_report, write_run


def test_data_files_are_listed_with_their_rows(page: Page) -> None:
    assert page.table("Data files")[1:] == [
        ["training", "data/train.json", "120"],
        ["scoring", "data/eval.json", "120"],
    ]


def test_training_length_is_given_in_steps_rows_epochs_and_tokens(page: Page) -> None:
    assert "Training ran for 20 optimizer steps with 6 rows per step. That is 120 rows, or 1.0 epochs." in page.body
    assert "These rows have 4,321 tokens, prompts included." in page.body


def test_method_gives_rank_and_parameters(page: Page) -> None:
    assert "LoRA adapters of rank 8" in page.body
    assert "1,000 parameters are trained, 2.0% of the base model's 50,000." in page.body


def test_hyperparameters_are_those_of_the_recipe(page: Page) -> None:
    assert page.facts["learning rate"] == "0.001, linear"
    assert page.facts["LoRA alpha"] == "16"
    assert page.facts["rows per step"] == "2 × 3"


def test_runs_of_one_base_model_are_compared_by_their_settings() -> None:
    main, slow = write_run(Path("outputs/a")), write_run(Path("outputs/slow"), learning_rate=0.0005)
    page, _ = write_and_read_report(main, slow)
    rows = page.table("Runs and the settings")[1:]
    assert [row[:4] for row in rows] == [
        ["outputs/a", "training.learning_rate=0.001", "6.00 [4.00, 8.00]", "10"],
        ["outputs/slow", "training.learning_rate=0.0005", "6.00 [4.00, 8.00]", "10"],
    ]
    assert rows[1][4] == "+0.00 [+0.00, +0.00]"
