"""The commands that a report prints."""

from pathlib import Path

from sample_runs import Page, write_and_read_report, write_run


def test_commands_reproduce_the_run(page: Page) -> None:
    assert page.commands == [
        "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m hw3 train "
        "outputs/a/recipe.yaml --run outputs/a",
        "hw3 eval outputs/a",
        "hw3 eval outputs/a --base-only --shots 0 2",
        "hw3 report outputs/a",
    ]


def test_report_command_names_all_runs_and_the_output_folder() -> None:
    main, slow = write_run(Path("outputs/a")), write_run(Path("outputs/slow"), learning_rate=0.0005)
    large = write_run(Path("outputs/large"), base="some/large", tokenizer="t2")
    _, markdown = write_and_read_report(main, slow, large, output=Path("docs/both"))
    assert "hw3 report outputs/a outputs/slow outputs/large --output docs/both" in markdown
    assert not Path("outputs/a/report.html").exists()


def test_missing_parts_are_named_with_their_commands() -> None:
    base_only = write_run(Path("outputs/shots"), labels=("base", "base+2"), is_trained=False)
    page, markdown = write_and_read_report(base_only)
    for command in (
        "hw3 train RECIPE.yaml --run outputs/shots",
        "hw3 eval outputs/shots",
        "make train MODEL=llama",
        "hw3 predict outputs/shots data/eval.json --checkpoint base",
    ):
        assert any(command in code for code in page.texts["code"]), command
        assert command in markdown


def test_run_without_scores_is_named_with_its_eval_command() -> None:
    page, _ = write_and_read_report(write_run(Path("outputs/trained"), labels=()))
    assert "outputs/trained has not been scored on data/eval.json yet." in page.body
    assert "hw3 eval outputs/trained --base-only --shots 0 1 2" in page.texts["code"]
